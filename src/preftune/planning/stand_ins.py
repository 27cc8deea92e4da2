"""What stands in, while a step is planned, for what cannot run without numbers or without a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import register_op_impl
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from preftune.batching.layout import Segments
from preftune.batching.segment_arrays import varlen_arrays
from preftune.config.model import ModelConfig
from preftune.model import forward, logprob_head
from preftune.model.attention import LayerCall
from preftune.model.attention_rules import shared
from preftune.model.quantization import BLOCK, names_to_quantize
from preftune.planning.live import LiveBytes

FUSED_ATTENTION = "preftune_planned"
"""Registered for attention in one call of a kernel that keeps no scores, as on GPUs."""
_TABLE = 16 * 4
"""Bytes of the 16 values that 4 bits stand for."""


# ---------------------------------------------------------------- quantised weights


def packed_bytes(shape: torch.Size, config: ModelConfig) -> tuple[int, int]:
    """Bytes of a quantised weight, and of its scales and tables, as bitsandbytes keeps them.

    Args:
        shape: of the weight, d_out x d_in.
        config: how it is quantised.
    """
    number = shape.numel()
    if config.load_in_8bit:
        return number, 4 * shape[0]
    blocks = ceil(number / BLOCK)
    if not config.bnb_4bit_use_double_quant:
        return ceil(number / 2), 4 * blocks + _TABLE
    # A byte a block; for those a scale in fp32 for 256 blocks, a table, and their mean.
    return ceil(number / 2), blocks + 4 * ceil(blocks / 256) + _TABLE + 256 * 4 + 4


class _Unpacked(torch.autograd.Function):
    """x W^T with W unpacked for the product, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return functional.linear(x, packed.new_empty(shape, dtype=x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return grads[0] @ packed.new_empty(ctx.shape, dtype=grads[0].dtype), None, None


class PackedLinear(nn.Linear):
    """A linear layer whose weight takes the bytes of a quantised one.

    A `nn.Linear`, so that adapters wrap it. bitsandbytes computes in one type whatever it is given
    (4 bits), and PEFT copies what it gives.
    """

    def __init__(
        self, layer: nn.Module, shape: torch.Size, config: ModelConfig, dtype: Any
    ) -> None:
        """Take the place of a layer.

        Args:
            layer: `nn.Linear`, or transformers' Conv1D.
            shape: of its weight, d_out x d_in.
            config: how it is quantised.
            dtype: that products are computed in; None: in that of the input.
        """
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.shape, self.dtype = shape, dtype
        packed, scales = packed_bytes(shape, config)
        place: Any = {"dtype": torch.uint8, "device": "meta"}
        self.weight = nn.Parameter(torch.empty(packed, **place), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, **place))
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes and bytes of the product."""
        x = input if self.dtype is None else input.to(self.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y = _Unpacked.apply(x, self.weight, self.shape)
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(input.dtype).clone()


def pack(model: PreTrainedModel, config: ModelConfig, products: torch.dtype | None) -> None:
    """Give a model's linear layers, all but the head, the bytes of quantised ones.

    Args:
        model: without numbers; changed in place.
        config: how its layers are quantised.
        products: as in `load_model`.
    """
    name = config.bnb_4bit_compute_dtype
    dtype = products or torch.float32 if name == "auto" else getattr(torch, str(name), None)
    if config.load_in_8bit:
        dtype = products
    for layer_name in sorted(names_to_quantize(model)):
        layer: Any = model.get_submodule(layer_name)
        shape = layer.weight.shape
        if not isinstance(layer, nn.Linear):  # Conv1D: d_in x d_out
            shape = torch.Size(reversed(shape))
        parent, _, last = layer_name.rpartition(".")
        setattr(model.get_submodule(parent), last, PackedLinear(layer, shape, config, dtype))


# ---------------------------------------------------------------- attention of GPUs


class _FusedAttention(torch.autograd.Function):
    """Attention of (tokens, heads, head_dim) queries, and keys and values with more tokens."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:2], value.shape[2])
        log_sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `model.attention_varlen` gathers, with the kernel stood in for."""
    assert segments is not None
    segments.calls.append(LayerCall(-1, query.shape[-1], value.shape[-1], False, False))
    number = len(varlen_arrays(segments).kv_index)
    index = shared(
        segments, "planned", query.device, lambda: torch.empty(number, dtype=torch.int64)
    )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    keys, values = (t.index_select(0, index) for t in (key, value))
    return _FusedAttention.apply(query.contiguous(), keys, values).unsqueeze(0), None


AttentionInterface.register(FUSED_ATTENTION, _fused)


# ---------------------------------------------------------------- experts of a mixture


@register_op_impl(torch.ops.aten._grouped_mm.default)
def _grouped_product(
    mode: Any, func: Any, left: Tensor, right: Tensor, offs: Any = None, *rest: Any
) -> Tensor:
    """Shapes of a grouped product in any type; PyTorch's own check refuses all but bf16."""
    if left.dim() == 2 and right.dim() == 2:  # a weight's gradient, expert by expert
        shape = (len(offs), left.shape[0], right.shape[1])
    elif left.dim() == 2:
        shape = (left.shape[0], right.shape[2])
    else:
        shape = (*left.shape[:-1], right.shape[-1])
    with mode:
        return left.new_empty(shape)


# ---------------------------------------------------------------- while a step is planned


@contextmanager
def without_numbers() -> Iterator[None]:
    """Let the model run on shapes.

    The head is recognised by its class alone: its weight is no plain tensor here.
    """
    with _swapped(logprob_head, "_is_plain_linear", lambda head: type(head) is nn.Linear):
        yield


@contextmanager
def _swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@dataclass
class _Head:
    """`token_logps`, whose results and backward are the head's."""

    live: LiveBytes
    compute: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self.live.head():
            logps, alignment = self.compute(*args, **options)
        node = logps.grad_fn
        if node is not None:
            node.register_prehook(lambda *_: self.live.set_in_head(True))
            node.register_hook(lambda *_: self.live.set_in_head(False))
        return logps, alignment


@contextmanager
def head_told(live: LiveBytes) -> Iterator[None]:
    """Let what the head makes be counted as the head's.

    Args:
        live: that counts.
    """
    with _swapped(forward, "token_logps", _Head(live, forward.token_logps)):
        yield
