"""Steps of each engine on two processes, against one process with two threads.

    python benchmarks/engines.py --layers 6 --steps 5 --rounds 2

DPO steps in fp32 on the CPU, with a random model of SmolLM2-135M's width, on the same pairs: one
process with two threads, then each engine on two processes of one thread each, `--rounds` times
over in turn.
Communication is the time that gloo spends in collectives in one step of the first process, waiting
for the other included. Wall times: the machine must be idle.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import in_processes, make_examples, make_model
from torch.profiler import ProfilerActivity, profile

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import MicroBatching, RowSizes
from preftune.config.distributed import DistributedConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.losses import DPO
from preftune.model.layout_choice import choose_layout
from preftune.objective import PairObjective
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step

PAIRS = 8
ENGINES: dict[str, dict[str, Any]] = {
    "one process": {},
    "DDP": {},
    "FSDP2": {"fsdp": "full_shard"},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.measure:
        measure(options)
        return
    print(f"torch {torch.__version__}  {options.layers} layers, {PAIRS} pairs a step")
    print("engine        s a step  of one process  communication", flush=True)
    found: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    for _ in range(options.rounds):
        for name, results in found.items():
            results.append(run(name, options))
            show(name, results[-1:], found["one process"][-1:])
    if options.rounds > 1:
        print("medians")
        for name, results in found.items():
            show(name, results, found["one process"])


def show(name: str, results: list[list[float]], alone: list[list[float]]) -> None:
    """One row of the table."""
    seconds, share = (statistics.median(values) for values in zip(*results, strict=True))
    factor = statistics.median(took for took, _ in alone) / seconds
    print(f"{name:12}  {seconds:8.2f}  {factor:13.2f}x  {share:12.0%}", flush=True)


def parse() -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", choices=list(ENGINES), help=argparse.SUPPRESS)
    return parser.parse_args()


def run(name: str, options: argparse.Namespace) -> list[float]:
    """Seconds of a step, and the share of communication."""
    threads, processes = (2, 1) if name == "one process" else (1, 2)
    words = ["--layers", str(options.layers), "--steps", str(options.steps)]
    return in_processes(processes, threads, __file__, "--measure", name, *words)


def measure(options: argparse.Namespace) -> None:
    """In each process: a step to warm up, some with a watch, one under the profiler."""
    runtime = Runtime("fp32", seed=0)
    torch.manual_seed(0)
    policy = make_model(options.layers)
    examples = make_examples(PAIRS, 96, 160, 160, spread=0.5)
    choice = choose_layout(policy, None, "auto", 1024)
    make = partial(make_optimizer, config=TrainingConfig())
    config = DistributedConfig(**ENGINES[options.measure])
    engine = runtime.spread(policy, make, config, max_grad_norm=1.0)
    state = TrainState.at_start(engine, runtime.device)
    reference = torch.zeros(PAIRS, 2, dtype=torch.float64)
    batcher = RowBatcher(examples, reference, Layout(choice.name, policy.limits), runtime.device)
    batching = MicroBatching(RowSizes.of(examples), choice.name, PAIRS // runtime.world_size)
    objective = PairObjective(DPO(beta=0.1))
    rows = list(range(PAIRS))

    def step() -> float:
        began = time.perf_counter()
        shares = batching.split(rows, runtime.rank, runtime.world_size)
        micro_batches = [batcher(share, rows) for share in shares]
        train_step(state, micro_batches, objective, runtime, num_rows=PAIRS, learning_rate=1e-6)
        return time.perf_counter() - began

    step()
    seconds = statistics.median(step() for _ in range(options.steps))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        took = step()
    waiting = sum(e.time_range.elapsed_us() for e in profiled.events() if "gloo:" in e.name)
    if runtime.is_main:
        print(json.dumps([seconds, waiting / 1e6 / took]))
    leave_process_group()


if __name__ == "__main__":
    main()
