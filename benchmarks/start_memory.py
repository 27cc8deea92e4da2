"""The most memory that each of two processes holds until an engine has a model.

    python benchmarks/start_memory.py --layers 24

A random Llama in fp32 on the CPU, loaded from a folder as `preftune train` does it. The memory is
what a process held at most, less what it held before: on CPUs the device's and the host's are one.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_processes, make_model

from preftune.config.distributed import DistributedConfig
from preftune.config.model import ModelConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.recipes.start_model import StartModel
from preftune.training.optimizer import make_optimizer

ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "FSDP2": {"fsdp": "full_shard"},
    "ZeRO-3": {"zero_stage": 3},
}
MIB = 2**20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.layers).model
        model.save_pretrained(folder)
        largest = max(p.numel() for p in model.parameters()) * 4 / MIB
        size = sum(p.numel() for p in model.parameters()) * 4 / MIB
        del model
        print(f"torch {torch.__version__}  weights {size:.0f} MiB, the largest {largest:.0f} MiB")
        print("engine    most on rank 0, MiB  most on rank 1, MiB  held then on rank 1, MiB")
        for name in ENGINES:
            (first, _), (second, held) = in_processes(2, 1, __file__, "--measure", name, folder)
            print(f"{name:8}  {first:19.0f}  {second:19.0f}  {held:24.0f}")


def measure(name: str, folder: str) -> None:
    """In each process: from loading to the engine."""
    runtime = Runtime("fp32", seed=0)
    engines = DistributedConfig(**ENGINES[name])
    if engines.zero_stage is not None:
        import deepspeed  # noqa: F401, TID251  # its own memory is not the model's
    before = resident("VmRSS")
    config = ModelConfig(model_name_or_path=folder)
    start = StartModel.load(config, runtime, is_cut=engines.shards_weights)
    make = partial(make_optimizer, config=TrainingConfig())
    engine = runtime.spread(start.loaded.policy, make, engines, max_grad_norm=1.0)
    most, held = resident("VmHWM") - before, resident("VmRSS") - before
    found = runtime.gather((most, held))
    del engine
    if runtime.is_main:
        print(json.dumps(found))
    leave_process_group()


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
