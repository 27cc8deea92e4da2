"""Save and restore everything that training changes.

    step-00000100/model.safetensors      weights by parameter name, in the training dtype
    step-00000100/optimizer.safetensors  "<state>/<parameter name>"
    step-00000100/reference.safetensors  of a reference that follows the policy: as the model's
    step-00000100/rng.safetensors        "<rank>/<generator>"
    step-00000100/state.json             counters, metrics, configuration
    step-00000100/manifest.json          size and checksum of each of them; written last

The learning-rate schedule and the order of the data are functions of the step and are not saved.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune.errors import CheckpointError
from preftune.files import fsync, remove_tree
from preftune.metrics import MetricState
from preftune.model.load import named_weights
from preftune.training.generators import restore_generators
from preftune.training.integrity import (
    STATE,
    checked_files,
    damaged,
    read_document,
    write_manifest,
)
from preftune.training.step import TrainState
from preftune.training.tensor_files import Damaged, FileSum, TensorFile, write_bytes, write_tensors

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint will hold."""

    tensors: Mapping[str, Tensors]
    """File name -> tensors. Those that training changes are the live ones, which only an update of
    the weights changes, never a forward or a backward."""
    document: Mapping[str, Any]
    """Of `state.json`."""

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
    tensors["rng.safetensors"] = {
        f"{rank}/{name}": tensor
        for rank, own in enumerate(generators)
        for name, tensor in own.items()
    }
    document = {
        "step": state.step,
        "num_tokens": int(state.num_tokens),
        "running": None if state.running is None else state.running.tolist(),
        "window": window,
        "guards": state.guards.state(),
        **extra,
    }
    return Snapshot(tensors, document)


def write_checkpoint(folder: Path, content: Snapshot) -> None:
    """Write a checkpoint beside its place, flush it to disk, and rename it there.

    Args:
        folder: `checkpoints/step-...`; it appears only when it is complete.
        content: what it holds.

    Raises:
        CheckpointError: it could not be written; whatever stood there before stays.
    """
    temporary = folder.with_name(f".partial-{folder.name}")
    try:
        remove_tree(temporary)
        temporary.mkdir(parents=True)
        files = {
            name: write_tensors(temporary / name, tensors)
            for name, tensors in content.tensors.items()
        }
        text = json.dumps(content.document, default=str)
        files[STATE] = write_bytes(temporary / STATE, text.encode())
        write_manifest(temporary, files)
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        _put_in_place(temporary, folder)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are "
            "untouched; free some space or lower keep_last_n_checkpoints, and run the same command "
            "to go on"
        ) from error
    finally:
        remove_tree(temporary)


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
    folder: Path, state: TrainState, model: nn.Module, *, rank: int, device: torch.device
) -> None:
    """Put weights, optimizer, counters, metrics and generators back as they were.

    Every byte is checked against the manifest as it is read; weights and optimizer state of the
    host are read into their places.

    Args:
        folder: a complete checkpoint.
        state: changed in place; after an error it holds anything.
        model: the module inside the engine's wrapper.
        rank: of this process: its generators are restored, and rank 0 takes over the metrics
            window, which is that of all ranks.
        device: that this process computes on.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    document = read_document(folder)
    read = _Reader(folder)
    load_weights(folder, model)
    if state.reference is not None:
        load_weights(folder, state.reference.model, "reference.safetensors")
    read("optimizer.safetensors", lambda file: _optimizer_targets(file, state, model))
    generators = read("rng.safetensors", _empty)
    try:
        prefix = f"{rank}/"
        own = {k.removeprefix(prefix): v for k, v in generators.items() if k.startswith(prefix)}
        _restore_counters(document, state, is_main=rank == 0)
        restore_generators(own, device)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise damaged(folder, error) from error


def _restore_counters(document: dict[str, Any], state: TrainState, *, is_main: bool) -> None:
    state.step = document["step"]
    state.num_tokens = torch.full_like(state.num_tokens, document["num_tokens"])
    if document["running"] is not None:
        state.running = state.num_tokens.new_tensor(document["running"])
    state.guards.restore(document["guards"])
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
    current = model.state_dict()
    wanted = {key: current[key] for key in named_weights(model)}

    def targets(file: TensorFile) -> Tensors:
        shapes = {key: shape for key, (_, shape) in file.tensors.items()}
        other = [key for key, tensor in wanted.items() if shapes.get(key) != tensor.shape]
        other += sorted(shapes.keys() - wanted.keys())
        if other:
            raise CheckpointError(
                f"the checkpoint {folder} belongs to another model: {', '.join(other[:3])} differ "
                "in shape or stand in only one of the two; give the model that the run was started "
                "with"
            )
        return wanted

    _Reader(folder)(name, targets)


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
        name: tensor if name in parameters else tensor.clone()
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
