"""Peak memory and CPU time of a step in each layout, as the prompt grows.

    python benchmarks/layout_memory.py --layers 30 --prompts 240 480

A model of SmolLM2-135M's width with random weights trains in fp32 on pairs of random tokens, first
without gradient (as the reference pass, evaluation and score do), then with. Each measurement has a
process of its own; medians are printed. Memory is what resident memory grew by at its peak (Linux).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import make_examples, make_model

from preftune.batching.batcher import MicroBatch
from preftune.batching.layout import build_layout
from preftune.losses import DPO
from preftune.model.attention import SEGMENTS
from preftune.objective import PairObjective

LAYOUTS = ("shared_prefix", "concatenated", "separate")


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.measure:
        print(json.dumps(measure(options, options.prompts[0])))
        return
    print(f"threads {torch.get_num_threads()}  torch {torch.__version__}  {options}")
    print("prompt  layout         scoring MiB  CPU s   training MiB  CPU s")
    for prompt in options.prompts:
        runs: dict[str, list[list[float]]] = {name: [] for name in LAYOUTS}
        for _ in range(options.repeats):
            for name in LAYOUTS:
                runs[name].append(in_own_process(name, prompt))
        for name in LAYOUTS:
            scoring, scored, training, trained = map(
                statistics.median, zip(*runs[name], strict=True)
            )
            print(
                f"{prompt:6}  {name:13}  {scoring:11.0f}  {scored:5.1f}   "
                f"{training:12.0f}  {trained:5.1f}",
                flush=True,
            )


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6, help="30 is SmolLM2-135M")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--prompts", type=int, nargs="+", default=[240, 480], help="tokens")
    parser.add_argument("--chosen", type=int, default=60, help="tokens")
    parser.add_argument("--rejected", type=int, default=60, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=LAYOUTS, help="one layout and prompt, in this process")
    return parser.parse_args()


def in_own_process(name: str, prompt: int) -> list[float]:
    """What `measure` returns in a fresh process with the same options."""
    words = [*sys.argv[1:], "--measure", name, "--prompts", str(prompt)]
    command = [sys.executable, __file__, *words]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(options: argparse.Namespace, prompt: int) -> list[float]:
    """MiB and CPU seconds of a forward without gradient, and of a training step."""
    torch.manual_seed(0)
    model = make_model(options.layers)
    model.model.set_attn_implementation(SEGMENTS if options.measure == "shared_prefix" else "sdpa")
    examples = make_examples(options.pairs, prompt, options.chosen, options.rejected)
    layout = build_layout(examples, options.measure)
    batch = MicroBatch(layout, len(examples), torch.zeros(len(examples), 2).double())
    objective = PairObjective(DPO(beta=0.1))
    before = resident_mib("VmRSS")
    results: list[float] = []
    for with_gradient in (False, True):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        began = time.process_time()
        with torch.set_grad_enabled(with_gradient):
            output = objective(model, batch)
        if with_gradient:
            (output.loss_sum / len(examples)).backward()
        results += [resident_mib("VmHWM") - before, time.process_time() - began]
    return results


def resident_mib(key: str) -> float:
    """Resident memory of this process: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    main()
