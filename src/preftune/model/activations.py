"""What of a forward is kept for the backward: computed again, or moved to the host's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm")
_ATTENTION = ("attention", "attn")
SMALLEST = 1 << 20
"""Bytes of a tensor that is worth moving."""


def recompute(model: PreTrainedModel, what: Literal[True, "selective"]) -> None:
    """Let a model's layers compute activations again in the backward.

    Args:
        model: changed in place.
        what: True: all, from the input of each layer; "selective": all but what matrix products and
            attention have given, which are most of the time and less than half of the memory.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    # transformers renamed it after 5.17, the oldest version supported here.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether an operator's result is kept."""
    library, _, name = str(operator).partition(".")
    name = name.partition(".")[0] if library == "aten" else str(operator)
    keeps = name in _PRODUCTS or any(word in name for word in _ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


@dataclass
class _Moved:
    """A tensor in the host's memory, and on its way back."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    arrived: Any = None
    was_taken: bool = False
    """Whether the backward has had it."""


@dataclass
class HostActivations:
    """Moves what one forward keeps to the host's memory, and brings it back for its backward.

    On a GPU copies run beside the computation, into pinned memory; the host never waits. While the
    backward works on one tensor, the one before it is on its way.
    """

    smallest: int = SMALLEST
    """Bytes below which a tensor stays."""
    _moved: list[_Moved] = field(default_factory=list)
    _stream: Any = None

    @contextmanager
    def kept(self, device: torch.device) -> Iterator[None]:
        """Where the forward runs.

        Args:
            device: of the model.
        """
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        with saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | int:
        # Weights are there anyway; products keep transposed views of them.
        base = tensor if tensor._base is None else tensor._base
        if isinstance(base, nn.Parameter) or tensor.nbytes < self.smallest:
            return tensor
        source, pinned = tensor.detach(), self._stream is not None
        host = torch.empty_like(source, device="cpu", pin_memory=pinned)
        if self._stream is None:
            host.copy_(source)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(self._stream):
                host.copy_(source, non_blocking=True)
            source.record_stream(self._stream)
        self._moved.append(_Moved(host, tensor.device))
        return len(self._moved) - 1

    def _unpack(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        moved = self._moved[kept]
        self._fetch(moved)
        if kept and not self._moved[kept - 1].was_taken:
            self._fetch(self._moved[kept - 1])
        back, moved.back, moved.was_taken = moved.back, None, True
        assert back is not None  # fetched above
        if moved.arrived is not None:
            stream = torch.cuda.current_stream(moved.device)
            stream.wait_event(moved.arrived)
            back.record_stream(stream)
        return back

    def _fetch(self, moved: _Moved) -> None:
        if moved.back is not None:
            return
        if self._stream is None:
            moved.back = moved.host.to(moved.device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            moved.back = moved.host.to(moved.device, non_blocking=True)
            moved.arrived = self._stream.record_event()
