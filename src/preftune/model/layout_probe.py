"""Small forwards of a model in two layouts, compared: what `layout_choice` decides by."""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel

from preftune.batching.layout import Layout, PairLayout, build_layout
from preftune.model.attention import LayerCall
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.quantization import product_dtype
from preftune.schema import Completion, TokenizedExample

# Mean and largest difference of a token's log-prob, nats: rounding, against a wrong mask, which
# moves them by whole nats. In bf16 the composition of a batch alone moves single tokens by 0.5;
# fp16 rounds eight times as finely.
TOLERANCES = {
    torch.float64: (1e-6, 1e-5),
    torch.float32: (1e-4, 2e-3),
    torch.float16: (0.01, 0.3),
    torch.bfloat16: (0.05, 1.5),
}
GRADIENT_TOLERANCES = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.float16: 0.02,
    torch.bfloat16: 0.05,
}
"""Relative difference of the gradient's norm."""
TRIAL_TOKENS = 4096
"""The row that kernels are timed on has no more tokens."""
TRIAL_REPEATS = 5


def computing(policy: PolicyModel, autocast: torch.dtype | None) -> AbstractContextManager[object]:
    """The products of training: in `autocast`, or in the weights' type."""
    if autocast is None:
        return nullcontext()
    return torch.autocast(policy.model.device.type, dtype=autocast)


@dataclass(frozen=True)
class Probe:
    """A model's own numbers on three small pairs, and the same pairs packed."""

    examples: list[TokenizedExample]
    padded: Tensor
    autocast: torch.dtype | None

    @classmethod
    def of(cls, policy: PolicyModel, longest: int, autocast: torch.dtype | None) -> "Probe":
        """Score the pairs padded, with the attention that the model has."""
        examples = _probe_examples(policy, longest)
        layout = build_layout(examples, Layout("concatenated", policy.limits))
        with computing(policy, autocast):
            padded = _per_token(policy, layout)
        return cls(examples, padded, autocast)

    def packed(self, policy: PolicyModel) -> tuple[str | None, list[LayerCall]]:
        """Why packing is not right under the model's present attention; what layers asked."""
        layout = build_layout(self.examples, Layout("shared_prefix", policy.limits))
        with computing(policy, self.autocast):
            packed = _per_token(policy, layout)
        layers = policy.model.config.get_text_config().num_hidden_layers
        calls: list[LayerCall] = []
        for block in layout.blocks:
            assert block.segments is not None
            calls = block.segments.calls
            if len(calls) != layers:
                return f"{len(calls)} of its {layers} layers called the packed attention", calls
        return differing(packed, self.padded, rounded_to(policy, self.autocast)), calls


def rounded_to(policy: PolicyModel, autocast: torch.dtype | None) -> torch.dtype:
    """The type whose rounding the model's numbers show: of products, or of the weights."""
    if autocast is not None:
        return autocast
    own = policy.model.dtype
    return max(own, product_dtype(policy) or own, key=lambda dtype: torch.finfo(dtype).eps)


def differing(got: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """How log-probs of tokens differ by more than rounding; None if they do not."""
    off = (got - expected).abs()
    mean, largest = TOLERANCES[dtype]
    if not (off.mean() <= mean and off.max() <= largest):
        return f"log-probs differ by up to {float(off.max()):.3g} nats a token"
    return None


@dataclass(frozen=True)
class Trial:
    """A forward and backward of a packed row of ordinary length."""

    logps: Tensor
    gradient_norm: float
    seconds: float

    def differs(self, other: "Trial", dtype: torch.dtype) -> str | None:
        """How its numbers differ from another trial's by more than rounding."""
        why = differing(self.logps, other.logps, dtype)
        off = abs(self.gradient_norm - other.gradient_norm)
        if why is None and not off <= GRADIENT_TOLERANCES[dtype] * other.gradient_norm:
            why = f"the gradient's norm is {self.gradient_norm:.4g}, not {other.gradient_norm:.4g}"
        return why


def run_trial(
    policy: PolicyModel,
    longest: int,
    autocast: torch.dtype | None,
    *,
    with_backward: bool,
    repeats: int,
) -> Trial:
    """Run the model under its present attention, as it will train; weights stay as they are.

    Args:
        policy: in eval mode, and left so.
        longest: tokens of the longest row, which bounds the trial's.
        autocast: type of the products.
        with_backward: False for a model that only scores.
        repeats: runs to time after the first one; 0 for none.
    """
    examples = _trial_examples(policy.model, longest)
    layout = build_layout(examples, Layout("shared_prefix", policy.limits)).to(policy.model.device)
    # Activation checkpointing works in train mode only.
    policy.train(with_backward)
    try:
        with computing(policy, autocast):
            # The first run may compile the kernel.
            logps, norm = _forward_backward(policy, layout, with_backward)
            seconds = []
            for _ in range(repeats):
                began = _now(policy.model.device)
                _forward_backward(policy, layout, with_backward)
                seconds.append(_now(policy.model.device) - began)
    finally:
        policy.eval()
    return Trial(logps, norm, statistics.median(seconds or [0.0]))


def _forward_backward(
    policy: PolicyModel, layout: PairLayout, with_backward: bool
) -> tuple[Tensor, float]:
    with torch.set_grad_enabled(with_backward):
        result = pair_logps(policy, layout)
        norm = 0.0
        if with_backward:
            signs = torch.ones_like(result.sums)
            signs[1::2] = -1
            weights = [p for p in policy.parameters() if p.requires_grad]
            # Not backward(), which would leave gradients behind.
            gradients = torch.autograd.grad((result.sums * signs).sum(), weights, allow_unused=True)
            norm = float(get_total_norm([g for g in gradients if g is not None]))
    return torch.cat(result.per_token).double(), norm


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def _per_token(policy: PolicyModel, layout: PairLayout) -> Tensor:
    return torch.cat(pair_logps(policy, layout.to(policy.model.device)).per_token).double()


def _probe_examples(policy: PolicyModel, longest: int) -> list[TokenizedExample]:
    """Three pairs, two of them on one prompt, past window and limits where rows can be."""
    window = getattr(policy.model.config.get_text_config(), "sliding_window", None) or 0
    # The answers to the long prompt end before and behind a limit.
    crossed = [limit - 6 for limit in policy.limits.lengths if longest > limit]
    long = max(11, window + 8 if longest > window else 0, *crossed)
    maker = _RandomPairs(policy.model)
    shared = maker.ids(long)
    return [maker.pair(shared, 5, 9), maker.pair(maker.ids(1), 1, 6), maker.pair(shared, 7, 3)]


def _trial_examples(model: PreTrainedModel, longest: int) -> list[TokenizedExample]:
    """At most eight pairs, with prompts and answers a quarter as long as the longest row."""
    length = max(1, min(longest, TRIAL_TOKENS) // 4)
    pairs = max(1, min(8, TRIAL_TOKENS // (3 * length)))
    maker = _RandomPairs(model)
    return [maker.pair(maker.ids(length), length, length) for _ in range(pairs)]


class _RandomPairs:
    """Pairs of random tokens, the same for the same model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.top = min(model.config.get_text_config().vocab_size, 1000)
        self.generator = torch.Generator().manual_seed(0)

    def ids(self, length: int) -> tuple[int, ...]:
        """Tokens."""
        return tuple(torch.randint(1, self.top, (length,), generator=self.generator).tolist())

    def pair(self, prompt: tuple[int, ...], chosen: int, rejected: int) -> TokenizedExample:
        """A pair with answers of the given lengths."""
        sides = (Completion(self.ids(chosen)), Completion(self.ids(rejected)))
        return TokenizedExample("probe", prompt, sides, ("chosen", "rejected"), "probe", 0)
