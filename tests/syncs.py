"""How often the host waits for the device, counted below PyTorch's own dispatch."""

from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.recipes.train import train
from tests.runs import tiny_config


class CountSyncs(TorchDispatchMode):
    """Counts operators that make the host wait: scalars read, and copies from device to host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if func is torch.ops.aten._local_scalar_dense.default or _leaves_device(args, result):
            self.seen[name] += 1
        return result


def _leaves_device(args, result) -> bool:
    if not isinstance(result, torch.Tensor) or result.device.type != "cpu":
        return False
    return any(isinstance(a, torch.Tensor) and a.device.type == "cuda" for a in args)


def syncs_of_a_run(root: Path, name: str, **settings) -> int:
    """Of a whole run under `root`."""
    with CountSyncs() as counter:
        train(tiny_config(root, output_dir=root / name, **settings))
    return sum(counter.seen.values())
