"""Save and restore everything that training changes.

    step-00000100/model.safetensors      weights by parameter name, in the training dtype
    step-00000100/optimizer.safetensors  "<state>/<parameter name>"
    step-00000100/reference.safetensors  of a reference that follows the policy: as the model's
    step-00000100/rng.safetensors        "<rank>/<generator>"
    step-00000100/state.json             counters, metrics, configuration
    step-00000100/manifest.json          size and checksum of each of them; written last

Where an engine cuts the state over ranks, each writes what it holds of weights and optimizer
state, model-00001-of-00002.safetensors and so on, as PyTorch's distributed checkpoints do. Either
kind goes on under any engine and any number of ranks.

The learning-rate schedule and the order of the data are functions of the step and are not saved.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune.distributed.parts import Part, whole_part
from preftune.distributed.ranks import ALONE, Ranks
from preftune.errors import CheckpointError
from preftune.files import fsync, remove_tree
from preftune.metrics import MetricState
from preftune.model.load import named_weights
from preftune.training.generators import restore_generators
from preftune.training.integrity import (
    MANIFEST,
    STATE,
    checked_files,
    damaged,
    read_document,
    write_manifest,
)
from preftune.training.part_files import PartReader
from preftune.training.step import TrainState
from preftune.training.tensor_files import Damaged, FileSum, TensorFile, write_bytes, write_tensors

Tensors = Mapping[str, Tensor]
_KIND = r"%s(-\d{5,}-of-\d{5,})?\.safetensors"


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
) -> Snapshot:
    """What training has come to.

    Args:
        state: of the training.
        model: the module inside the engine's wrapper, whose names the weights get.
        window: metrics of all ranks since the last logging step.
        generators: of every rank.
        extra: JSON values to keep: the configuration, fingerprints, the metrics offset.
    """
    tensors = {"model.safetensors": _weights(model)}
    if state.reference is not None:
        tensors["reference.safetensors"] = _weights(state.reference.model)
    tensors["optimizer.safetensors"] = _optimizer_tensors(state, model)
    tensors["rng.safetensors"] = _all_generators(generators)
    return Snapshot(tensors, _document(state, window, extra))


def _all_generators(generators: Sequence[Tensors]) -> dict[str, Tensor]:
    return {
        f"{rank}/{name}": tensor
        for rank, own in enumerate(generators)
        for name, tensor in own.items()
    }


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


def snapshot_of_rank(
    state: TrainState,
    model: nn.Module,
    window: MetricState,
    generators: Sequence[Tensors],
    extra: Mapping[str, Any],
    ranks: Ranks,
) -> Snapshot:
    """What this rank writes of a state that is cut over ranks; every rank calls it.

    Args:
        state: of the training.
        model: as in `snapshot`.
        window: as in `snapshot`.
        generators: as in `snapshot`.
        extra: as in `snapshot`.
        ranks: of the run.
    """
    state.engine.rest()
    weights = named_weights(model)
    number = f"{ranks.rank + 1:05d}-of-{ranks.world_size:05d}"
    parts = {
        f"model-{number}.safetensors": state.engine.weight_parts(weights),
        f"optimizer-{number}.safetensors": state.engine.moment_parts(weights),
    }
    saved = {
        file: {name: part for name, part in own.items() if part.is_saved}
        for file, own in parts.items()
    }
    tensors: dict[str, Tensors] = {
        file: {name: part.tensor for name, part in own.items()} for file, own in saved.items()
    }
    first_rows = {
        file: {name: part.first for name, part in own.items()} for file, own in saved.items()
    }
    document = None
    if ranks.is_main:
        tensors["rng.safetensors"] = _all_generators(generators)
        document = _document(state, window, extra)
    return Snapshot(tensors, document, first_rows)


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


def load_checkpoint(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    *,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> None:
    """Put weights, optimizer, counters, metrics and generators back as they were.

    Every byte is checked against the manifest as it is read; weights and optimizer state of the
    host are read into their places.

    Args:
        folder: a complete checkpoint.
        state: changed in place; after an error it holds anything.
        model: the module inside the engine's wrapper.
        device: that this process computes on.
        ranks: of the run, which all call it. The generators of this rank are restored, if there
            was such a rank, and rank 0 takes over the metrics window, which is that of all.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    document = ranks.together(lambda: read_document(folder))
    in_parts = ranks.together(lambda: is_in_parts(folder))
    if state.engine.is_sharded or in_parts:
        _load_parts(folder, state, model, ranks)
    else:
        ranks.together(lambda: _load_whole(folder, state, model))
    ranks.together(lambda: _restore_rest(folder, document, state, ranks, device))


def _load_whole(folder: Path, state: TrainState, model: nn.Module) -> None:
    load_weights(folder, model)
    if state.reference is not None:
        load_weights(folder, state.reference.model, "reference.safetensors")
    read = _Reader(folder)
    read("optimizer.safetensors", lambda file: _optimizer_targets(file, state, model))


def _load_parts(folder: Path, state: TrainState, model: nn.Module, ranks: Ranks) -> None:
    """Weights and optimizer state where the checkpoint or the engine has them in parts."""
    state.engine.rest()
    weights = named_weights(model)
    for kind, parts in (
        ("model", state.engine.weight_parts(weights)),
        ("optimizer", state.engine.moment_parts(weights)),
    ):
        read_parts = partial(_read_parts, folder, kind, parts, ranks.rank, ranks.world_size)
        ranks.together(read_parts)
        state.engine.put_back(weights, parts)
    if state.reference is not None:
        reference = state.reference.model
        ranks.together(lambda: load_weights(folder, reference, "reference.safetensors"))


def _read_parts(
    folder: Path, kind: str, parts: Mapping[str, Part], rank: int = 0, num_ranks: int = 1
) -> None:
    """Fill parts from the files of a kind; ranks share the work of checking those."""
    files = {k: v for k, v in checked_files(folder).items() if re.fullmatch(_KIND % kind, k)}
    try:
        if not files:
            raise Damaged(f"{kind}.safetensors is absent")
        for name in sorted(files)[rank::num_ranks]:
            with TensorFile(folder / name, files[name]) as file:
                file.finish()
        reader = PartReader(parts)
        reader.read(folder / name for name in sorted(files))
    except (OSError, Damaged) as error:
        raise damaged(folder, error) from error
    if reader.other:
        raise _of_another_model(folder, reader.other)


def is_in_parts(folder: Path) -> bool:
    """Whether the weights of a checkpoint lie in several files."""
    return "model.safetensors" not in checked_files(folder)


def _restore_rest(
    folder: Path,
    document: dict[str, Any],
    state: TrainState,
    ranks: Ranks,
    device: torch.device,
) -> None:
    generators = _Reader(folder)("rng.safetensors", _empty)
    try:
        prefix = f"{ranks.rank}/"
        own = {k.removeprefix(prefix): v for k, v in generators.items() if k.startswith(prefix)}
        _restore_counters(document, state, is_main=ranks.is_main)
        if ranks.rank < document["spread"]["processes"]:  # else there was no such rank
            restore_generators(own, device)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise damaged(folder, error) from error


def _restore_counters(document: dict[str, Any], state: TrainState, *, is_main: bool) -> None:
    state.step = document["step"]
    state.num_tokens = torch.full_like(state.num_tokens, document["num_tokens"])
    if document["running"] is not None:
        state.running = state.num_tokens.new_tensor(document["running"])
    state.guards.restore(document["guards"])
    if state.loss_scale is not None:
        state.loss_scale.restore(document["loss_scale"])
    state.num_skipped = torch.full_like(state.num_skipped, len(state.guards.skipped_steps))
    state.window.restore(document["window"], state.bad_step.device, is_main=is_main)


def load_weights(folder: Path, model: nn.Module, name: str = "model.safetensors") -> None:
    """Give a model the weights of a checkpoint.

    Args:
        folder: a complete checkpoint.
        model: the module whose names the weights have.
        name: which of the checkpoint's files.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    wanted = {key: tensor.detach() for key, tensor in named_weights(model).items()}
    if name == "model.safetensors" and is_in_parts(folder):
        _read_parts(folder, "model", {key: whole_part(t, 0) for key, t in wanted.items()})
        return

    def targets(file: TensorFile) -> Tensors:
        shapes = {key: shape for key, (_, shape) in file.tensors.items()}
        other = [key for key, tensor in wanted.items() if shapes.get(key) != tensor.shape]
        other += sorted(shapes.keys() - wanted.keys())
        if other:
            raise _of_another_model(folder, other)
        return wanted

    _Reader(folder)(name, targets)


def _of_another_model(folder: Path, other: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {folder} belongs to another model: {', '.join(other[:3])} differ in shape "
        "or stand in only one of the two; give the model that the run was started with"
    )


class _Reader:
    """Reads files of a checkpoint, each whole and as it was written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, FileSum] = checked_files(folder)

    def __call__(self, name: str, choose: Callable[[TensorFile], Tensors]) -> Tensors:
        """Read the file `name` into the tensors that `choose` names for what it holds."""
        try:
            if name not in self._files:
                raise Damaged(f"{name} is absent")
            with TensorFile(self._folder / name, self._files[name]) as file:
                try:
                    targets = choose(file)
                except (CheckpointError, KeyError):
                    file.finish()  # a damaged header is no sign of another model
                    raise
                file.read_into(targets)
        except (OSError, KeyError, Damaged) as error:
            raise damaged(self._folder, error) from error
        return targets


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as they are, and copies of buffers, which a forward may change."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor.detach() if name in parameters else tensor.clone()
        for name, tensor in named_weights(model).items()
    }


def _optimizer_tensors(state: TrainState, model: nn.Module) -> dict[str, Tensor]:
    moments = state.engine.optimizer.state
    return {
        f"{key}/{name}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in moments.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _optimizer_targets(file: TensorFile, state: TrainState, model: nn.Module) -> Tensors:
    parameters = dict(model.named_parameters())
    # A dry step has made the optimizer's state; a new one has none yet.
    expected = {name: tensor.shape for name, tensor in _optimizer_tensors(state, model).items()}
    found = {name: shape for name, (_, shape) in file.tensors.items()}
    if expected and found != expected:
        other = sorted(name for name in expected | found if expected.get(name) != found.get(name))
        raise Damaged(f"{file.path.name} has another state of {', '.join(other[:3])}")
    targets = {}
    for label, (dtype, shape) in file.tensors.items():
        key, name = label.split("/", 1)
        parameter = parameters[name]
        held = state.engine.optimizer.state[parameter]
        if key not in held or held[key].shape != shape or held[key].dtype != dtype:
            # Fused kernels want the step count beside the moments, on the parameter's device.
            held[key] = torch.empty(shape, dtype=dtype, device=parameter.device)
        targets[label] = held[key]
    return targets


def _empty(file: TensorFile) -> Tensors:
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in file.tensors.items()}
