"""Run by torchrun: fp16 under every engine takes the steps of one process, an overflow included.

torchrun --nproc_per_node 2 fp16_checks.py FOLDER

The folder holds what one process did, of `trace` in trace.pt and of `settings` in straight/.
"""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune import ExperimentConfig, train
from preftune.config.distributed import DistributedConfig
from preftune.distributed.engine import Engine
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.training import loss_scale
from tests.distributed.train_all import make_cut
from tests.invariants.harness import Trace, short_training
from tests.runs import read_metrics, read_state, tiny_settings
from tests.tiny import make_pairs, write_jsonl

BAD, MAX_NORM = 3, 1.0
"""A row whose gradient exceeds fp32 under any scale: on one of two ranks, in two steps of six."""
LOW = 256.0
"""A scale under which nothing else overflows."""
PLAIN = DistributedConfig()
ENGINES = {
    "ddp": PLAIN,
    "fsdp": DistributedConfig(fsdp="full_shard"),
    "hybrid": DistributedConfig(fsdp="hybrid_shard", fsdp_shard_size=1, fsdp_offload_params=True),
    "zero0": DistributedConfig(zero_stage=0),
    "zero1": DistributedConfig(zero_stage=1, offload_optimizer=True),
    "zero2": DistributedConfig(zero_stage=2),
    "zero3": DistributedConfig(zero_stage=3, offload_optimizer=True, offload_param=True),
}


def start_low() -> None:
    """Let the scale rise within a few steps."""
    loss_scale.START, loss_scale.PATIENCE = LOW, 2


def trace(folder: Path, num_ranks: int, **options: Any) -> Trace:
    """Two epochs of batches of 8, 8 and 5 pairs; gradients are clipped.

    With so large an epsilon, AdamW moves by what gradients are, not only by their signs.
    """
    return short_training(
        folder,
        micro_batch=4,
        accumulation=2 // num_ranks,
        optimizer="adamw",
        learning_rate=1e-2,
        precision="fp16",
        max_grad_norm=MAX_NORM,
        adam_epsilon=1.0,
        weights={BAD: 1e300},
        **options,
    )


def settings(root: Path, folder: Path, num_ranks: int, **options: Any) -> dict[str, Any]:
    """Of a whole run with the bad row, whose checkpoints are kept."""
    rows = make_pairs(21, seed=0)
    rows[BAD]["weight"] = 1e300
    data = root / "bad.jsonl"
    if not data.exists():
        write_jsonl(data, rows)
    return tiny_settings(
        root,
        dataset_name=data,
        output_dir=folder,
        mixed_precision="fp16",
        checkpointing_steps=1,
        keep_last_n_checkpoints=None,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2 // num_ranks,
        **options,
    )


def check_equal(got: Trace, expected: Trace) -> None:
    """The same scales and left-out steps; numbers to less than the rounding of fp16 (5e-4).

    Seen are 1e-4, as other rows share a product; two ranks in fp32 are 1e-6 apart.
    """
    assert got.scales == expected.scales
    for one, other in ((got.losses, expected.losses), (got.grad_norms, expected.grad_norms)):
        assert one == pytest.approx(other, rel=3e-4)
    off = float((got.weights - expected.weights).norm())
    assert off < 3e-4 * expected.moved * len(expected.weights) ** 0.5, off


class Mutant(Runtime):
    """Makes engines that `change` has changed."""

    change: Callable[[Engine, int], None]

    def spread(self, *args: Any, **options: Any) -> Engine:
        """Changed."""
        engine = super().spread(*args, **options)
        Mutant.change(engine, self.rank)
        return engine


def clips_before(engine: Engine, rank: int) -> None:
    """The norm, and so what is cut to `max_grad_norm`, is that of the scaled gradient."""
    engine._unscaled = lambda norm: norm


def updates_with_the_scale(engine: Engine, rank: int) -> None:
    """The optimizer never learns of the scale."""
    update = engine.update

    def changed(*, skip: Tensor) -> None:
        engine.loss_scale = None
        update(skip=skip)

    engine.update = changed


def skips_on_one_rank(engine: Engine, rank: int) -> None:
    """A rank that does not see the others' overflow."""
    clip = engine.clip_gradients
    if rank == 0:
        engine.clip_gradients = lambda: clip().nan_to_num(1.0, 1.0)


def check_mutants(folder: Path, expected: Trace) -> None:
    """None passes; one that parts the ranks is tried where no update waits for the others."""
    for name in ("ddp", "fsdp", "zero0", "zero1", "zero3"):
        mutants = [clips_before, updates_with_the_scale]
        if name in ("ddp", "fsdp"):
            mutants.append(skips_on_one_rank)
        for Mutant.change in mutants:
            got = trace(folder, 2, engines=ENGINES[name], make_runtime=Mutant)
            with pytest.raises(AssertionError):
                check_equal(got, expected)


def check_going_on(root: Path) -> None:
    """A run whose scale has changed goes on under other engines, as the straight one went on."""
    straight = root / "straight"
    lines = read_metrics(straight)
    assert len({line["loss_scale"] for line in lines[:3]}) > 1
    for name, config in (
        ("fsdp", {"fsdp": "full_shard"}),
        ("zero1", {"zero_stage": 1}),
        ("zero3", {"zero_stage": 3}),
    ):
        options = settings(root, root / name, 2, **config)
        make_cut(options, str(straight), 3)
        train(ExperimentConfig(**options))
        check_lines(read_metrics(root / name), lines)
    again = settings(root, root / "again", 2)
    make_cut(again, str(root / "zero3"), 5)  # a checkpoint of parts
    train(ExperimentConfig(**again))
    check_lines(read_metrics(root / "again"), lines)


def check_lines(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Of metrics."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        for key in ("loss_scale", "overflow_steps", "learning_rate", "num_tokens"):
            assert one[key] == other[key]
        for key in {"loss", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=3e-4)


def main() -> None:
    """Every check, on both ranks."""
    root = Path(sys.argv[1])
    start_low()
    expected = Trace(**torch.load(root / "trace.pt"))
    skipped = [math.isinf(loss) for loss in expected.losses]
    assert 0 < sum(skipped) < len(skipped)
    scales = expected.scales
    assert any(b > a for a, b in pairwise(scales))
    assert max(norm for norm in expected.grad_norms if math.isfinite(norm)) > MAX_NORM
    folder = root / "references"
    for config in ENGINES.values():
        check_equal(trace(folder, 2, engines=config), expected)
    check_mutants(folder, expected)
    check_going_on(root)
    state = read_state(root / "zero3" / "checkpoints" / "step-00000006")["loss_scale"]
    assert state["num_skipped"] == 2
    if Runtime("fp32", 0).is_main:
        print("all checks held")
    leave_process_group()


if __name__ == "__main__":
    main()
