"""What a run takes up from what is on disk: its folder, a checkpoint, the metrics so far."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.config.experiment import ExperimentConfig
from preftune.errors import CheckpointError
from preftune.files import hold_alone
from preftune.tracking.jsonl import MetricsFile
from preftune.training.integrity import read_document
from preftune.training.run_folder import RunStart, plan_start


def hold_folder(config: ExperimentConfig, start: RunStart) -> int:
    """Lock a run's folder, and see that it still is what the run was planned from.

    Args:
        config: of the run.
        start: the plan.

    Returns:
        The lock's file descriptor; to close it is to give the folder free.

    Raises:
        CheckpointError: another process has the folder, or had it since.
    """
    root = start.folder.root
    lock = hold_alone(root)
    if plan_start(config, held=True) == start:
        return lock
    os.close(lock)
    raise CheckpointError(
        f"another process has worked in {root} since this command began; run it again to go on "
        "from there"
    )


def look_into(checkpoint: Path, identity: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """The document of a checkpoint that a run can go on from.

    Args:
        checkpoint: its folder.
        identity: what must be the same in the run that wrote it.
        num_steps: of this run.

    Raises:
        CheckpointError: it is damaged, of another run, or of a later step.
    """
    document = read_document(checkpoint)
    before = document["identity"]
    changed = [
        f"{key} was {before.get(key)}, now {now}"
        for key, now in identity.items()
        if before.get(key) != now
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint} cannot go on to the same numbers here: {'; '.join(changed)}. Restore "
            "the files, versions and pairs a step of that run, or start a new --output_dir"
        )
    if document["step"] > num_steps:
        raise CheckpointError(
            f"{checkpoint} is of step {document['step']}, and this run has {num_steps} steps; "
            "raise num_epochs or max_train_steps, or take an earlier checkpoint"
        )
    return document


def take_over_metrics(metrics_file: MetricsFile, checkpoint: Path | None, offset: int) -> None:
    """Let metrics go on behind the lines that a checkpoint had seen.

    Args:
        metrics_file: of the run.
        checkpoint: that the run goes on from; None where it starts.
        offset: bytes of metrics that the checkpoint had seen.

    Raises:
        CheckpointError: some of those lines are gone.
    """
    if checkpoint is not None and not metrics_file.path.exists():
        # A checkpoint of another run folder: its lines up to that step come along.
        source = checkpoint.parent.parent / metrics_file.path.name
        if source.exists():
            shutil.copyfile(source, metrics_file.path)
    if metrics_file.offset < offset:
        raise CheckpointError(
            f"{metrics_file.path} lacks lines that {checkpoint} had seen; restore it, or start "
            "a new --output_dir"
        )
    if metrics_file.path.exists():
        metrics_file.rewind(offset)
