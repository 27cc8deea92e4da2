"""Save everything that training changes; `restore` puts it back.

    step-00000100/model.safetensors      weights by parameter name, in the training dtype; where
                                         only some of them train, those
    step-00000100/optimizer.safetensors  "<state>/<parameter name>"
    step-00000100/reference.safetensors  of a reference that follows the policy: as the model's
    step-00000100/taken.safetensors      what the base gave up to the adapter at the start (PiSSA)
    step-00000100/rng.safetensors        "<rank>/<generator>"
    step-00000100/state.json             counters, metrics, configuration
    step-00000100/manifest.json          size and checksum of each of them; written last

Where an engine cuts the state over ranks, each writes what it holds of weights and optimizer
state, model-00001-of-00002.safetensors and so on, as PyTorch's distributed checkpoints do. Either
kind goes on under any engine and any number of ranks.

The learning-rate schedule and the order of the data are functions of the step and are not saved.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from preftune.distributed.parts import Part
from preftune.distributed.ranks import ALONE, Ranks
from preftune.errors import CheckpointError
from preftune.files import fsync, remove_tree
from preftune.metrics import MetricState
from preftune.model.load import named_weights, trained_weights
from preftune.training.integrity import MANIFEST, STATE, write_manifest
from preftune.training.step import TrainState
from preftune.training.tensor_files import FileSum, write_bytes, write_tensors

Tensors = Mapping[str, Tensor]
TAKEN = "taken.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold."""

    tensors: Mapping[str, Tensors]
    """File name -> tensors. Those that training changes are the live ones, which only an update of
    the weights changes, never a forward or a backward."""
    document: Mapping[str, Any] | None
    """Of `state.json`, which rank 0 writes; None on the others."""
    first_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """File name -> where its tensors begin in the whole ones; no entry for files of those."""

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.nbytes for tensors in self.tensors.values() for t in tensors.values())


def snapshot(
    state: TrainState,
    model: nn.Module,
    window: MetricState,
    generators: Sequence[Tensors],
    extra: Mapping[str, Any],
    ranks: Ranks = ALONE,
    taken: Tensors | None = None,
) -> Snapshot:
    """What this rank writes of what training has come to.

    Where the engine cuts the state over ranks, all of them call it; else rank 0 has everything.

    Args:
        state: of the training.
        model: the module inside the engine's wrapper, whose names the weights get.
        window: metrics of all ranks since the last logging step.
        generators: of every rank.
        extra: JSON values to keep: the configuration, fingerprints, the metrics offset.
        ranks: of the run.
        taken: see `model.adapters.Adapter`.
    """
    engine = state.engine
    engine.rest()
    weights = _copied_buffers(trained_weights(model))
    number = f"-{ranks.rank + 1:05d}-of-{ranks.world_size:05d}" if engine.is_sharded else ""
    files = {
        f"model{number}.safetensors": _saved(engine.weight_parts(weights)),
        f"optimizer{number}.safetensors": _saved(engine.moment_parts(weights)),
    }
    tensors: dict[str, Tensors] = {
        file: {name: part.tensor for name, part in parts.items()} for file, parts in files.items()
    }
    first_rows = {
        file: {name: part.first for name, part in parts.items()}
        for file, parts in files.items()
        if engine.is_sharded
    }
    if not ranks.is_main:
        return Snapshot(tensors, None, first_rows)
    if state.reference is not None:
        reference = _copied_buffers(named_weights(state.reference.model))
        tensors["reference.safetensors"] = {k: v.detach() for k, v in reference.items()}
    if taken:
        tensors[TAKEN] = taken
    tensors["rng.safetensors"] = {
        f"{rank}/{name}": tensor
        for rank, own in enumerate(generators)
        for name, tensor in own.items()
    }
    return Snapshot(tensors, _document(state, window, extra), first_rows)


def _copied_buffers(weights: Tensors) -> dict[str, Tensor]:
    """Parameters as they are, and copies of buffers, which a forward may change."""
    return {
        name: tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        for name, tensor in weights.items()
    }


def _saved(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if part.is_saved}


def _document(state: TrainState, window: MetricState, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step": state.step,
        "num_tokens": int(state.num_tokens),
        "running": None if state.running is None else state.running.tolist(),
        "window": window,
        "guards": state.guards.state(),
        "loss_scale": None if state.loss_scale is None else state.loss_scale.state(),
        **extra,
    }


def write_together(folder: Path, content: Snapshot, ranks: Ranks) -> None:
    """Write a checkpoint of which each rank has a part; every rank calls it.

    Args:
        folder: `checkpoints/step-...`, which all ranks see; it appears only when it is complete.
        content: what this rank writes of it.
        ranks: of the run.

    Raises:
        CheckpointError: it could not be written; whatever stood there before stays.
    """
    temporary = _temporary(folder)
    explained = _explained(folder)
    try:
        ranks.decide(explained(lambda: _begin(temporary)))
        files = ranks.together(explained(lambda: _write_files(temporary, content)))
        all_files = {name: file for own in ranks.gather(files) for name, file in own.items()}
        ranks.decide(explained(lambda: _publish(temporary, folder, all_files)))
    finally:
        if ranks.is_main:
            remove_tree(temporary)


def write_checkpoint(folder: Path, content: Snapshot) -> None:
    """Write a checkpoint beside its place, flush it to disk, and rename it there.

    Args:
        folder: `checkpoints/step-...`; it appears only when it is complete.
        content: what it holds.

    Raises:
        CheckpointError: it could not be written; whatever stood there before stays.
    """
    temporary = _temporary(folder)
    try:
        with _explained(folder):
            _begin(temporary)
            _publish(temporary, folder, _write_files(temporary, content))
    finally:
        remove_tree(temporary)


def _temporary(folder: Path) -> Path:
    return folder.with_name(f".partial-{folder.name}")


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are "
            "untouched; free some space or lower keep_last_n_checkpoints, and run the same command "
            "to go on"
        ) from error


def _begin(temporary: Path) -> None:
    remove_tree(temporary)
    temporary.mkdir(parents=True)


def _write_files(temporary: Path, content: Snapshot) -> dict[str, FileSum]:
    files = {
        name: write_tensors(temporary / name, tensors, content.first_rows.get(name))
        for name, tensors in content.tensors.items()
    }
    if content.document is not None:
        text = json.dumps(content.document, default=str)
        files[STATE] = write_bytes(temporary / STATE, text.encode())
    for name in files:
        fsync(temporary / name)
    return files


def _publish(temporary: Path, folder: Path, files: Mapping[str, FileSum]) -> None:
    write_manifest(temporary, files)
    for path in (temporary / MANIFEST, temporary):
        fsync(path)
    _put_in_place(temporary, folder)


def _put_in_place(temporary: Path, folder: Path) -> None:
    before = None
    if folder.exists():  # the same step, saved before a resume
        before = _set_aside(folder)
    temporary.rename(folder)
    fsync(folder.parent)
    if before is not None:
        remove_tree(before, ignore_errors=False)


def discard(folder: Path) -> None:
    """Delete a checkpoint; a deletion cut off half-way leaves nothing that looks complete."""
    remove_tree(_set_aside(folder), ignore_errors=False)


def _set_aside(folder: Path) -> Path:
    doomed = folder.with_name(f".deleted-{folder.name}")
    remove_tree(doomed)
    return folder.rename(doomed)
