"""How fast a training step is, against the matrix-product rate of the same machine.

    make bench
    python benchmarks/step_rate.py --layers 30 --pairs 8 --repeats 5 --precision bf16

A model of SmolLM2-135M's shape with random weights (speed does not depend on their values) trains
on pairs of random tokens. The layouts take turns inside one process, so that a noisy machine slows
them alike; medians of process CPU time are compared. The share of the physical limit is the
arithmetic that the step needs (each prompt once, no padding) over the measured rate of plain matrix
products in the same precision.
"""

import argparse
import statistics
import time
from contextlib import nullcontext

import torch
from common import make_examples, make_model

from preftune.batching.batcher import MicroBatch
from preftune.batching.layout import build_layout
from preftune.losses import DPO
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel
from preftune.objective import PairObjective

LAYOUTS = ("shared_prefix", "concatenated", "separate")


def main() -> None:
    """Measure and print."""
    options = parse()
    torch.manual_seed(0)
    model = make_model(options.layers)
    lengths = (options.prompt, options.chosen, options.rejected)
    examples = make_examples(options.pairs, *lengths, spread=options.spread)
    objective = PairObjective(DPO(beta=0.1))
    autocast = (
        torch.autocast("cpu", torch.bfloat16) if options.precision == "bf16" else nullcontext()
    )
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for repeat in range(options.repeats + 1):
        for name in LAYOUTS:
            layout = build_layout(examples, name)
            model.model.set_attn_implementation(SEGMENTS if name == "shared_prefix" else "sdpa")
            batch = MicroBatch(layout, len(examples), torch.zeros(len(examples), 2).double())
            began = time.process_time()
            with autocast:
                output = objective(model, batch)
            (output.loss_sum / len(examples)).backward()
            model.zero_grad(set_to_none=True)
            if repeat:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    rate = matmul_flops_per_cpu_second(options.precision)
    print(f"threads {torch.get_num_threads()}  torch {torch.__version__}  {options}")
    print(f"matrix products: {rate / 1e9:.0f} GFLOP per CPU second")
    needed = step_flops(model, build_layout(examples, "shared_prefix"))
    packed = seconds["shared_prefix"]
    for name in LAYOUTS:
        layout = build_layout(examples, name)
        computed = sum(block.input_ids.numel() for block in layout.blocks)
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(seconds[name], packed, strict=True))
        print(
            f"{name:13} {computed:6} token-forwards  {median:8.3f} CPU s a step  "
            f"{len(examples) / median:6.2f} pairs per CPU s  {ratio:5.2f} x packed  "
            f"needed arithmetic at {needed / median / rate:4.0%} of the matrix-product rate"
        )


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="30 is SmolLM2-135M")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=60, help="tokens")
    parser.add_argument("--chosen", type=int, default=90, help="tokens")
    parser.add_argument("--rejected", type=int, default=50, help="tokens")
    parser.add_argument("--spread", type=float, default=0.5, help="of lengths: 0 makes all equal")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    return parser.parse_args()


def step_flops(model: PolicyModel, layout) -> float:
    """Arithmetic that the step needs on its real tokens: 6 per weight and token; no padding.

    Attention's own products are left out: they are a few percent at these lengths.
    """
    head = model.model.get_output_embeddings().weight.numel()
    backbone = sum(p.numel() for p in model.parameters()) - head  # the tied embedding counts once
    scored = sum(sum(block.num_scored) for block in layout.blocks)
    return 6.0 * (backbone * layout.num_tokens + head * scored)


def matmul_flops_per_cpu_second(precision: str) -> float:
    """Rate of the model's own kind of product, the median of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    rates = []
    for _ in range(7):
        began = time.process_time()
        for _ in range(20):
            a @ b
        rates.append(20 * 2 * 1024 * 576 * 1536 / (time.process_time() - began))
    return statistics.median(rates)


if __name__ == "__main__":
    main()
