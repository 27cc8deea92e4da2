"""Save and restore everything that training changes.

    step-00000100/model.safetensors      weights by parameter name, in the training dtype
    step-00000100/optimizer.safetensors  "<state>/<parameter name>"
    step-00000100/reference.safetensors  of a reference that follows the policy: as the model's
    step-00000100/rng.safetensors        generators of torch on the CPU and the devices
    step-00000100/state.json             counters, metrics, configuration, generators of Python

The learning-rate schedule and the order of the data are functions of the step and are not saved.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preftune.errors import CheckpointError
from preftune.files import fsync, remove_tree
from preftune.metrics import MetricState
from preftune.model.load import named_weights
from preftune.training.checkpoint_values import check_values
from preftune.training.step import TrainState

VERSION = 1


def save_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, window: MetricState, extra: dict[str, Any]
) -> None:
    """Write a checkpoint beside its place, flush it to disk, and rename it there.

    Args:
        folder: `checkpoints/step-...`; it appears only when it is complete.
        state: of the training.
        model: the module inside the engine's wrapper, whose names the weights get.
        window: metrics of all ranks since the last logging step.
        extra: JSON values to keep: the configuration, fingerprints, the metrics offset.
    """
    temporary = folder.with_name(f".partial-{folder.name}")
    remove_tree(temporary)
    temporary.mkdir(parents=True)
    try:
        save_file(named_weights(model), temporary / "model.safetensors")
        if state.reference is not None:
            reference = named_weights(state.reference.model)
            save_file(reference, temporary / "reference.safetensors")
        save_file(_optimizer_tensors(state, model), temporary / "optimizer.safetensors")
        save_file(_generator_tensors(), temporary / "rng.safetensors")
        document = {
            "version": VERSION,
            "step": state.step,
            "num_tokens": int(state.num_tokens),
            "running": None if state.running is None else state.running.tolist(),
            "window": window,
            "guards": state.guards.state(),
            "python_rng": random.getstate(),
            "numpy_rng": _numpy_state(),
            **extra,
        }
        (temporary / "state.json").write_text(json.dumps(document, default=str))
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        if folder.exists():  # the same step, saved before a resume
            discard(folder)
        temporary.rename(folder)
        fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}); earlier checkpoints are "
            "untouched; free some space or lower keep_last_n_checkpoints, and run the same command "
            "to go on"
        ) from error
    finally:
        remove_tree(temporary)


def discard(folder: Path) -> None:
    """Delete a checkpoint; a deletion cut off half-way leaves nothing that looks complete."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    remove_tree(doomed)
    folder.rename(doomed)
    remove_tree(doomed)


def read_document(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: it is absent, damaged, or of another version of preftune.
    """
    try:
        document = json.loads((folder / "state.json").read_text())
        if document["version"] != VERSION:
            raise ValueError(f"format {document['version']}, and this preftune reads {VERSION}")
        check_values(document)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error
    return document


def load_checkpoint(
    folder: Path, state: TrainState, model: nn.Module, *, is_main: bool = True
) -> None:
    """Put weights, optimizer, counters, metrics and generators back as they were.

    Args:
        folder: a complete checkpoint.
        state: changed in place.
        model: the module inside the engine's wrapper.
        is_main: whether this rank takes over the metrics window, which is that of all ranks.

    Raises:
        CheckpointError: it is damaged or belongs to another model.
    """
    document = read_document(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        reference = {}
        if state.reference is not None:
            reference = load_file(folder / "reference.safetensors")
        optimizer = load_file(folder / "optimizer.safetensors")
        generators = load_file(folder / "rng.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(folder, error) from error
    _restore_weights(folder, weights, model)
    if state.reference is not None:
        _restore_weights(folder, reference, state.reference.model)
    try:
        _restore_optimizer(optimizer, state, model)
        _restore_counters(document, state, is_main=is_main)
        _restore_generators(generators, document)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, error) from error


def _restore_counters(document: dict[str, Any], state: TrainState, *, is_main: bool) -> None:
    state.step = document["step"]
    state.num_tokens = torch.full_like(state.num_tokens, document["num_tokens"])
    if document["running"] is not None:
        state.running = state.num_tokens.new_tensor(document["running"])
    state.guards.restore(document["guards"])
    state.num_skipped = torch.full_like(state.num_skipped, len(state.guards.skipped_steps))
    state.window.restore(document["window"], state.bad_step.device, is_main=is_main)


def _damaged(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {folder} is damaged ({error}); delete that folder to go on from the one "
        "before it"
    )


def _restore_weights(folder: Path, weights: dict[str, Tensor], model: nn.Module) -> None:
    current = named_weights(model)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    other = [name for name, tensor in current.items() if shapes.get(name) != tensor.shape]
    other += sorted(shapes.keys() - current.keys())
    if other:
        raise CheckpointError(
            f"the checkpoint {folder} belongs to another model: {', '.join(other[:3])} differ in "
            "shape or stand in only one of the two; give the model that the run was started with"
        )
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(weights[name])


def _optimizer_tensors(state: TrainState, model: nn.Module) -> dict[str, Tensor]:
    moments = state.optimizer.state
    return {
        f"{key}/{name}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in moments.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _restore_optimizer(tensors: dict[str, Tensor], state: TrainState, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    # A dry step has made the optimizer's state; a new one has none yet.
    expected = {name: tensor.shape for name, tensor in _optimizer_tensors(state, model).items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if expected and found != expected:
        different = sorted(
            name for name in expected | found if expected.get(name) != found.get(name)
        )
        raise ValueError(f"the optimizer's state differs in {', '.join(different[:3])}")
    for label, tensor in tensors.items():
        key, name = label.split("/", 1)
        parameter = parameters[name]
        # Fused kernels want the step count beside the moments, on the parameter's device.
        state.optimizer.state[parameter][key] = tensor.to(parameter.device)


def _generator_tensors() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count()):
        states[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
    return states


def _restore_generators(states: dict[str, Tensor], document: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{index}"], index)
    kind, internal, gauss = document["python_rng"]
    random.setstate((kind, tuple(internal), gauss))
    name, keys, *rest = document["numpy_rng"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _numpy_state() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [name, np.asarray(keys).tolist(), *rest]
