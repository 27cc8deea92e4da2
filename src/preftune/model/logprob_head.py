"""From hidden states to log-probabilities of given tokens, at the scored positions only.

Logits are never kept: `token_logps` makes them for a chunk of positions at a time, reduces each
chunk to one number a position, and makes them again in the backward.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_STEP, LARGEST_CHUNK = 256, 8192


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to its logits after the head's matrix product.

    `None` or 1.0 where a model does nothing of the kind.
    """

    softcap: float | None = None
    """Gemma 2: logits become softcap * tanh(logits / softcap)."""
    scale: float = 1.0
    """Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""

    @classmethod
    def from_config(cls, config: object) -> "HeadTransform":
        """Read the transform from a transformers model config."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(softcap=float(softcap) if softcap else None, scale=scale)

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply scale, then soft-cap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in place, where no gradient is recorded."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def head_chunk_size(total_memory_bytes: int, hidden_size: int, vocab_size: int) -> int:
    """Positions whose logits exist at once: a multiple of 256, at most 8,192.

    A chunk may take a sixteenth of the memory. Every chunk reads the head's weight and adds to its
    gradient: a GPU needs thousands of positions a chunk to hide that, a CPU a few hundred.

    Args:
        total_memory_bytes: what `chunk_memory` says of the device.
        hidden_size: inputs of the head.
        vocab_size: outputs of the head.
    """
    # Logits in 32 bits, their product and gradient in 16 or 32; hidden states and their gradients.
    bytes_per_position = 10 * vocab_size + 8 * hidden_size
    steps = total_memory_bytes // 16 // bytes_per_position // CHUNK_STEP
    return min(max(steps, 1) * CHUNK_STEP, LARGEST_CHUNK)


def chunk_memory(device: torch.device) -> int:
    """Bytes to give `head_chunk_size`: a GPU's memory, or a quarter of the host's, 8 GiB at most.

    The host's memory is shared with everything else, and larger chunks buy no time there.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, 8 * 2**30)


def token_logps(
    hidden: Float[Tensor, "scored hidden"],
    head: nn.Module,
    labels: Int[Tensor, " scored"],
    transform: HeadTransform,
    *,
    with_alignment: bool = False,
    chunk_size: int = CHUNK_STEP,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"] | None]:
    """Log-probability of each label, in nats.

    The product runs in the dtype of the weights or of autocast; the log-sum-exp runs in fp32, or
    in fp64 where the logits are fp64. The gradient of the weight is summed over chunks in the same
    precision as the log-sum-exp.

    Args:
        hidden: outputs of the last layer at the scored positions.
        head: the output embedding. Logits of anything but a plain `nn.Linear` are made whole by
            calling it (see `_is_plain_linear`).
        labels: the token that each position should predict.
        transform: what this model does to its logits.
        with_alignment: also return log p(label) - log sum_v p(v)^2, without gradient: the token
            weight of WPO (arXiv:2406.11827, section 4).
        chunk_size: most positions whose logits exist at once; see `head_chunk_size`.

    Returns:
        Log-probs, and the alignments or None.
    """
    if _is_plain_linear(head):
        return _ChunkedLogps.apply(
            hidden, head.weight, head.bias, labels, transform, with_alignment, chunk_size
        )
    logits = transform(head(hidden))
    logits = logits.to(_reduction_dtype(logits.dtype))
    log_normaliser = logits.logsumexp(dim=-1)
    logps = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_normaliser
    if not with_alignment:
        return logps, None
    with torch.no_grad():
        log_sum_p2 = (2.0 * logits).logsumexp(dim=-1) - 2.0 * log_normaliser
        return logps, logps.detach() - log_sum_p2


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether `head(x)` is exactly `x @ weight.T + bias`, so that calling it may be skipped.

    Not so for adapters around the head and quantised layers (subclasses or other modules),
    quantised or sharded weights (subclasses of Tensor), `nn.Identity`, and a head whose call does
    more: hooks, or a `forward` replaced on the instance, as engines do that bring weights in late.
    ZeRO-3 hooks every module, and brings in any weight that a forward reaches for.
    """
    if type(head) is not nn.Linear:
        return False
    by_zero = hasattr(head.weight, "ds_id")
    if not by_zero and (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)):
        return False
    return (
        type(head.weight) in (nn.Parameter, Tensor)
        and head.weight.dim() == 2
        and head.weight.is_floating_point()
    )


def _reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that `F.linear` would compute in here: autocast leaves fp64 alone."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _chunks(num_positions: int, chunk_size: int) -> Iterator[slice]:
    """Even parts: a last part of a few positions would cost a whole pass over the weight."""
    parts = math.ceil(num_positions / chunk_size)
    size = math.ceil(num_positions / max(parts, 1))
    return (slice(i * size, min((i + 1) * size, num_positions)) for i in range(parts))


class _ChunkLogits:
    """Logits of one chunk at a time, in buffers that the next chunk overwrites.

    Fresh memory for every chunk costs a CPU a tenth of the product's time in page faults.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: HeadTransform,
        chunk_size: int,
    ) -> None:
        self.hidden = hidden
        self.weight = weight.to(hidden.dtype)
        self.bias = None if bias is None else bias.to(hidden.dtype)
        self.transform = transform
        rows = min(chunk_size, len(hidden))
        self.products = hidden.new_empty(rows, len(weight))
        wide = _reduction_dtype(hidden.dtype)
        same = wide == hidden.dtype
        self.logits = self.products if same else torch.empty_like(self.products, dtype=wide)

    def make(self, chunk: slice) -> Tensor:
        """Logits of the positions in `chunk`; the caller may write into them."""
        hidden = self.hidden[chunk]
        products, logits = self.products[: len(hidden)], self.logits[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=products)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=products)
        if logits.dtype != products.dtype:
            logits.copy_(products)
        return self.transform.apply_(logits)

    def narrow(self, values: Tensor) -> Tensor:
        """Values of the shape of the last logits, in the products' dtype and buffer."""
        if values.dtype == self.products.dtype:
            return values
        return self.products[: len(values)].copy_(values)


class _ChunkedLogps(torch.autograd.Function):
    """`token_logps` of a plain linear head; saves the normaliser of each position, no logits.

    Autocast is off inside both passes and the casts are written out, so that the backward computes
    in the forward's dtype wherever it is called.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: HeadTransform,
        with_alignment: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor | None]:
        dtype = _product_dtype(hidden, weight)
        ctx.hidden_dtype, ctx.transform, ctx.chunk_size = hidden.dtype, transform, chunk_size
        hidden = hidden.to(dtype)
        logps = hidden.new_empty(len(hidden), dtype=_reduction_dtype(dtype))
        log_normaliser = torch.empty_like(logps)
        alignment = torch.empty_like(logps) if with_alignment else None
        with torch.autocast(hidden.device.type, enabled=False):
            source = _ChunkLogits(hidden, weight, bias, transform, chunk_size)
            for chunk in _chunks(len(hidden), chunk_size):
                logits = source.make(chunk)
                own = logits.gather(1, labels[chunk].unsqueeze(1)).squeeze(1)
                largest = logits.amax(dim=1)
                terms = logits.sub_(largest.unsqueeze(1)).exp_()
                log_sum = terms.sum(dim=1).log_()
                log_normaliser[chunk] = largest + log_sum
                logps[chunk] = own - log_normaliser[chunk]
                if alignment is not None:
                    log_sum_p2 = 2.0 * (terms.norm(dim=1).log_() - log_sum)
                    alignment[chunk] = logps[chunk] - log_sum_p2
        ctx.save_for_backward(hidden, weight, bias, labels, log_normaliser)
        if alignment is not None:
            ctx.mark_non_differentiable(alignment)
        return logps, alignment

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The gradient of logp at the logits is one_hot(label) - p. The incoming gradient, one
        # number a position, is applied on the narrow side of each product.
        hidden, weight, bias, labels, log_normaliser = ctx.saved_tensors
        wide_dtype = log_normaliser.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden, dtype=ctx.hidden_dtype) if for_hidden else None
        of_weight = torch.zeros_like(weight, dtype=wide_dtype) if for_weight else None
        of_bias = torch.zeros_like(bias, dtype=wide_dtype) if for_bias else None
        factors = (-ctx.transform.scale * grads[0]).unsqueeze(1)
        with torch.autocast(hidden.device.type, enabled=False):
            source = _ChunkLogits(hidden, weight, bias, ctx.transform, ctx.chunk_size)
            for chunk in _chunks(len(hidden), ctx.chunk_size):
                wide = _softmax_minus_label(
                    source.make(chunk), labels[chunk], log_normaliser[chunk], ctx.transform.softcap
                )
                narrow = source.narrow(wide)
                if of_hidden is not None:
                    of_hidden[chunk] = (narrow @ source.weight) * factors[chunk]
                if of_weight is not None:
                    scaled = (hidden[chunk] * factors[chunk]).to(hidden.dtype)
                    _add_product(of_weight, narrow.t(), scaled)
                if of_bias is not None:
                    of_bias.addmv_(wide.t(), factors[chunk].squeeze(1))
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *(None,) * 4,
        )


def _softmax_minus_label(
    logits: Tensor, labels: Tensor, log_normaliser: Tensor, softcap: float | None
) -> Tensor:
    """Minus the gradient of logp at the logits before the soft-cap, in the memory of `logits`."""
    slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1.0)
    p = logits.sub_(log_normaliser.unsqueeze(1)).exp_()
    p[torch.arange(len(labels), device=labels.device), labels] -= 1.0
    return p if slope is None else p.mul_(slope)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a second copy where one kernel can do it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
