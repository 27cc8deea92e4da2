"""Put back everything that training changes, from a checkpoint; `checkpoint` says what is in it."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from preftune.distributed.parts import Part, whole_part
from preftune.distributed.ranks import ALONE, Ranks
from preftune.errors import CheckpointError
from preftune.model.load import named_weights, trained_weights
from preftune.training.checkpoint import TAKEN
from preftune.training.generators import restore_generators
from preftune.training.integrity import checked_files, damaged, read_document
from preftune.training.part_files import PartReader
from preftune.training.step import TrainState
from preftune.training.tensor_files import Damaged, FileSum, TensorFile, differing

Tensors = Mapping[str, Tensor]
REFERENCE = "reference.safetensors"
_KIND = r"%s(-\d{5,}-of-\d{5,})?\.safetensors"


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
    moments = state.engine.moment_parts(trained_weights(model))

    def targets(file: TensorFile) -> Tensors:
        expected = {name: part.shape for name, part in moments.items()}
        if other := differing(file.shapes, expected):
            raise Damaged(f"{file.path.name} has another state of {', '.join(other[:3])}")
        return {name: part.tensor for name, part in moments.items()}

    _Reader(folder)("optimizer.safetensors", targets)


def _load_parts(folder: Path, state: TrainState, model: nn.Module, ranks: Ranks) -> None:
    """Weights and optimizer state where the checkpoint or the engine has them in parts."""
    state.engine.rest()
    weights = trained_weights(model)
    for kind, parts in (
        ("model", state.engine.weight_parts(weights)),
        ("optimizer", state.engine.moment_parts(weights)),
    ):
        read_parts = partial(_read_parts, folder, kind, parts, ranks.rank, ranks.world_size)
        ranks.together(read_parts)
        state.engine.put_back(weights, parts)
    if state.reference is not None:
        reference = state.reference.model
        ranks.together(lambda: load_weights(folder, reference, REFERENCE))


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
    # A reference that follows the policy is frozen, and all of it is saved.
    weights = named_weights(model) if name == REFERENCE else trained_weights(model)
    wanted = {key: tensor.detach() for key, tensor in weights.items()}
    if name == "model.safetensors" and is_in_parts(folder):
        _read_parts(folder, "model", {key: whole_part(t, 0) for key, t in wanted.items()})
        return

    def targets(file: TensorFile) -> Tensors:
        if other := differing(file.shapes, {key: t.shape for key, t in wanted.items()}):
            raise _of_another_model(folder, other)
        return wanted

    _Reader(folder)(name, targets)


def taken_at_start(folder: Path | None) -> Tensors | None:
    """What the base gave up to the adapter when the run of a checkpoint began; None: nothing.

    Args:
        folder: a complete checkpoint; None: there is none yet.

    Raises:
        CheckpointError: it is damaged.
    """
    if folder is None or TAKEN not in checked_files(folder):
        return None
    return _Reader(folder)(TAKEN, _empty)


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


def _empty(file: TensorFile) -> Tensors:
    return {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in file.tensors.items()}
