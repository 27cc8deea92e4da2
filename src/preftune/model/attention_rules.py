"""What the kernels of packed attention share: a layer's rules, and arrays on its device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from preftune.batching.layout import Segments

T = TypeVar("T")


@dataclass(frozen=True)
class ScoreRules:
    """How a layer turns scores into weights, beyond who sees whom."""

    scale: float | None
    """Of the scores; None is head_dim ** -0.5."""
    dropout: float
    """Probability, 0 in eval mode."""
    window: int | None
    """A token sees this many positions, itself among them."""
    softcap: float | None
    """Gemma 2: scores become softcap * tanh(scores / softcap)."""
    sinks: Tensor | None
    """(heads,) gpt-oss: a logit more in each softmax, without a value."""


def shared(segments: Segments, key: object, device: torch.device, build: Callable[[], T]) -> T:
    """What `build` makes, once for all layers of a forward."""
    place = (key, device)
    if place not in segments.shared:
        segments.shared[place] = build()
    return segments.shared[place]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`; from pinned memory, so that the host never waits."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def computed(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys and values in the type that products are computed in.

    Under autocast, rotation leaves queries and keys in fp32 beside values in bf16, and only torch's
    own scaled_dot_product_attention casts them by itself.
    """
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[0].dtype
    return [tensor.to(dtype) for tensor in tensors]
