"""The host waits for the device on logging steps and on no others.

Counted below PyTorch's own dispatch, over whole runs: steps that do not log must add nothing.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.recipes.dpo import train
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
    with CountSyncs() as counter:
        train(tiny_config(root, output_dir=root / name, **settings))
    return sum(counter.seen.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "wpo"},
        {"loss_type": "simpo", "optimizer": "sgd"},
        {"loss_type": "aot"},
        {"loss_type": "beta_dpo"},
        {"max_tokens_per_microbatch": 96, "gradient_checkpointing": True},
        {"sync_reference": True, "reference_sync_steps": 3},
        {"on_nonfinite": "skip_batch", "loss_type": "bco"},
        {"mixed_precision": "fp16"},
    ],
    ids=["dpo", "wpo", "simpo-sgd", "aot", "beta_dpo", "checkpointing", "sync", "skip", "fp16"],
)
def test_steps_that_do_not_log_wait_for_nothing(tmp_path, settings):
    settings = settings | {"num_epochs": None, "logging_steps": 100, "warmup_ratio": 0.0}
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, **settings)
    assert long == short


def test_padded_layouts_wait_once_a_forward_inside_transformers(tmp_path):
    # It looks whether the positions of the rows restart. The packed layout says so itself.
    settings = {"num_epochs": None, "logging_steps": 100, "warmup_ratio": 0.0}
    settings |= {"forward_layout": "concatenated", "gradient_accumulation_steps": 1}
    settings |= {"loss_type": "simpo"}  # no reference pass in the first run only
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, **settings)
    assert long == short + 7


def test_the_counter_sees_steps_that_log(tmp_path):
    settings = {"num_epochs": None, "warmup_ratio": 0.0}
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, logging_steps=1, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, logging_steps=1, **settings)
    assert long >= short + 7
