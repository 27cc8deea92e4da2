"""Attention of a packed row, called by unedited models of transformers.

Registered under names of its own, so that transformers builds no mask and hands the layout on to
every layer. Linear layers see exactly the real tokens of a micro-batch; here each answer sees its
prompt and itself and nothing else. Which kernel computes it is the name that the model was given
(`set_attn_implementation`): nothing is kept in a global.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeAlias, assert_never

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from preftune.batching.layout import Segments
from preftune.distributed.sequence import SequenceGroup
from preftune.model.attention_flex import block_attention
from preftune.model.attention_rules import ScoreRules
from preftune.model.attention_shards import shared_attention
from preftune.model.attention_spans import span_attention
from preftune.model.attention_varlen import flash_attention, varlen_attention

PackedKernel: TypeAlias = Literal["sdpa", "varlen", "flash_attention_2", "flex"]
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor, Segments, ScoreRules], Tensor]

SEGMENTS = "preftune_segments"
"""Span by span with scaled_dot_product_attention: right for every model, on every device."""

# transformers reads meaning into names that hold "flash" or "flex", so ours do not.
REGISTERED: dict[PackedKernel, str] = {
    "sdpa": SEGMENTS,
    "varlen": "preftune_varlen",
    "flash_attention_2": "preftune_fa2",
    "flex": "preftune_blocks",
}
"""`attn_implementation` -> the name that transformers knows."""


FUSED: tuple[PackedKernel, ...] = ("varlen", "flash_attention_2", "flex")
"""Kernels that compute a packed row in one call, on CUDA GPUs, and not every model's."""


class LayerCall(NamedTuple):
    """What one layer asked of packed attention."""

    layer: int
    head_dim: int
    value_dim: int
    has_softcap: bool
    has_sinks: bool


def _register(name: str, kernel: Kernel) -> None:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        segments: Segments | None = None,
        sequence_group: SequenceGroup | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """What transformers calls in each layer.

        Args:
            module: the attention layer.
            query: (1, heads, tokens, head_dim), rotated.
            key: (1, key heads, tokens, head_dim), rotated.
            value: (1, key heads, tokens, value_dim).
            attention_mask: None: the segments say who sees whom.
            scaling: see `ScoreRules.scale`, and so on.
            dropout: of attention weights.
            sliding_window: of positions.
            softcap: of scores.
            s_aux: sinks.
            segments: the spans; reaches this function as a keyword of the model's forward.
            sequence_group: who shares the row, whose tokens these then are a part of; alike.

        Returns:
            (1, tokens, heads, value_dim), and no weights.
        """
        if segments is None or attention_mask is not None or query.shape[0] != 1:
            raise RuntimeError("packed attention was called without a packed row")
        layer = getattr(module, "layer_idx", -1)
        dims = query.shape[-1], value.shape[-1]
        segments.calls.append(LayerCall(layer, *dims, softcap is not None, s_aux is not None))
        rules = ScoreRules(scaling, dropout, sliding_window, softcap, s_aux)
        if sequence_group is None:
            return kernel(query, key, value, segments, rules), None
        shared = shared_attention(kernel, query, key, value, segments, rules, sequence_group)
        return shared, None

    AttentionInterface.register(name, attention)


_register(REGISTERED["sdpa"], span_attention)
_register(REGISTERED["varlen"], varlen_attention)
_register(REGISTERED["flash_attention_2"], flash_attention)
_register(REGISTERED["flex"], block_attention)


@dataclass(frozen=True)
class Demands:
    """What a model's layers need of a kernel, and where it would run."""

    device: torch.device
    dtype: torch.dtype
    """Of the products: autocast's, or the weights'."""
    has_dropout: bool
    """Whether attention weights may be dropped in training."""
    calls: Sequence[LayerCall]


def why_not(kernel: PackedKernel, demands: Demands) -> str | None:
    """Why a kernel cannot compute what a model needs; None if it should be able to.

    Example: varlen for Gemma 2: "it has no soft-capping of scores".
    """
    match kernel:
        case "sdpa":
            return None
        case "varlen":
            return _fused_why_not(demands) or _varlen_why_not(demands) or _flash_why_not(demands)
        case "flash_attention_2":
            if find_spec("flash_attn") is None:
                return "the package flash-attn is not installed"
            return _fused_why_not(demands) or _flash_why_not(demands)
        case "flex":
            return _fused_why_not(demands) or _flex_why_not(demands)
        case _:
            assert_never(kernel)


def _fused_why_not(demands: Demands) -> str | None:
    if demands.device.type != "cuda":
        return "it runs on CUDA GPUs only"
    if demands.has_dropout:
        return "it drops no attention weights (disable_dropout is false)"
    if any(call.has_sinks for call in demands.calls):
        return "it has no attention sinks"
    return None


def _varlen_why_not(demands: Demands) -> str | None:
    if "window_size" not in inspect.signature(varlen_attn).parameters:
        return f"torch {torch.__version__} has it without windows"
    if any(call.has_softcap for call in demands.calls):
        return "it has no soft-capping of scores"
    return None


def _flash_why_not(demands: Demands) -> str | None:
    if demands.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not in {_name(demands.dtype)}"
    if torch.cuda.get_device_capability(demands.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    for call in demands.calls:
        if call.head_dim != call.value_dim:
            return f"its keys and values are alike, not {call.head_dim} and {call.value_dim} wide"
        if call.head_dim % 8 or call.head_dim > 256:
            return f"its heads have a multiple of 8 dimensions, at most 256, not {call.head_dim}"
    return None


def _flex_why_not(demands: Demands) -> str | None:
    if demands.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it does not compute in {_name(demands.dtype)}"
    if any(min(call.head_dim, call.value_dim) < 16 for call in demands.calls):
        return "its heads have at least 16 dimensions"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
