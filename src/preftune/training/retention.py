"""Which checkpoints stay on disk, and which is the best."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.config.checkpoint import CheckpointConfig
from preftune.errors import CheckpointError, ConfigError
from preftune.files import remove_tree
from preftune.training.checkpoint import discard
from preftune.training.run_folder import RunFolder, step_of


@dataclass
class BestCheckpoint:
    """The best evaluation so far, which has a checkpoint at its step."""

    metric: str
    """As `metrics.jsonl` names it."""
    greater_is_better: bool
    value: float | None = None
    step: int | None = None

    @classmethod
    def of(cls, config: CheckpointConfig) -> "BestCheckpoint | None":
        """What `config` asks for, before the first evaluation; None where it asks for none."""
        if config.metric_for_best_model is None or config.greater_is_better is None:
            return None
        return cls(config.metric_for_best_model, config.greater_is_better)

    def is_beaten_by(self, record: Mapping[str, float]) -> bool:
        """Whether an evaluation is better than all before it; one that is no number never is.

        Raises:
            ConfigError: it has no such metric.
        """
        if self.metric not in record:
            has = ", ".join(sorted(name for name in record if name.startswith("eval/")))
            raise ConfigError(
                f"metric_for_best_model is {self.metric!r}, and evaluation gives {has}; take one "
                "of these, and run the same command to go on from the checkpoint just saved"
            )
        value = record[self.metric]
        if math.isnan(value) or self.value is None:
            return not math.isnan(value)
        return value > self.value if self.greater_is_better else value < self.value

    def take(self, record: Mapping[str, float], step: int) -> None:
        """Hold this evaluation as the best."""
        self.value, self.step = record[self.metric], step

    def restore(self, saved: Mapping[str, Any] | None, folder: RunFolder) -> None:
        """Go on with the best of a checkpoint, if it is by the same measure and still there."""
        same = saved and (saved["metric"], saved["greater_is_better"]) == (
            self.metric,
            self.greater_is_better,
        )
        if saved and same and saved["step"] is not None:
            if not folder.checkpoint(saved["step"]).is_dir():
                return
            self.value, self.step = saved["value"], saved["step"]

    def as_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return asdict(self)


def remove_old_checkpoints(
    folder: RunFolder, keep: int | None, max_gb: float | None = None, best_step: int | None = None
) -> None:
    """Delete what the retention does not keep, oldest first, and what kills left behind.

    Args:
        folder: of the run.
        keep: how many of the newest stay; None for all.
        max_gb: most space of all together, in 10^9 bytes; None for any.
        best_step: of the best checkpoint, which stays, as the newest does.

    Raises:
        CheckpointError: something cannot be deleted.
    """
    try:
        for leftover in folder.checkpoints.glob(".*"):
            remove_tree(leftover, ignore_errors=False)
        held = folder.list_checkpoints()
        free = [path for path in held[:-1] if step_of(path) != best_step]
        excess = set(held[:-keep]) if keep else set()
        sizes = {path: _size(path) for path in held} if max_gb is not None else {}
        for path in free:
            too_large = max_gb is not None and sum(sizes.values()) > max_gb * 1e9
            if path in excess or too_large:
                discard(path)
                sizes.pop(path, None)
    except OSError as error:
        raise CheckpointError(
            f"an old checkpoint in {folder.checkpoints} cannot be deleted ({error}); the newest is "
            "complete: make the folder writable, or keep all (--keep_last_n_checkpoints null), and "
            "run the same command to go on"
        ) from error


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.iterdir())
