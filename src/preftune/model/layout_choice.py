"""Which forward layout a model can take, found out on the model itself before training."""

from dataclasses import dataclass

import torch

from preftune.batching.layout import Layout, LayoutName, PairLayout, build_layout
from preftune.config.dpo import ForwardLayout
from preftune.errors import ModelError
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from preftune.schema import Completion, TokenizedExample

# Mean and largest difference of a token's log-prob, nats: rounding, against a wrong mask, which
# moves them by whole nats. In bf16 the composition of a batch alone moves single tokens by 0.5.
TOLERANCES = {torch.float64: (1e-6, 1e-5), torch.float32: (1e-4, 2e-3), torch.bfloat16: (0.05, 1.5)}


@dataclass(frozen=True)
class LayoutChoice:
    """How rows go through a model."""

    name: LayoutName
    why: str = ""
    """Why it is not `shared_prefix`, where that was wanted."""


def choose_layout(
    policy: PolicyModel, wanted: ForwardLayout, attention: str, longest: int
) -> LayoutChoice:
    """Take the packed layout where the model is proved to follow it.

    Where it is taken, the model's attention function is exchanged, for good.

    Args:
        policy: in eval mode, on its device.
        wanted: `auto` falls back to `concatenated`.
        attention: `attn_implementation` as the user gave it; `auto` and `sdpa` have a packed form.
        longest: tokens of the longest row: the probe reaches past a sliding window, and a limit of
            length, only if rows do.

    Raises:
        ModelError: `shared_prefix` is wanted, and the model does not follow it.
    """
    if wanted in ("concatenated", "separate"):
        return LayoutChoice(wanted)
    if attention in ("auto", "sdpa"):
        why = _take_packed_attention(policy, longest)
    else:
        why = f"attn_implementation {attention} has no packed form"
    if why is None:
        return LayoutChoice("shared_prefix")
    if wanted == "shared_prefix":
        raise ModelError(
            f"forward_layout is 'shared_prefix', and {why}; leave it out, and the pairs are padded"
        )
    return LayoutChoice("concatenated", why)


def _take_packed_attention(policy: PolicyModel, longest: int) -> str | None:
    """Exchange the attention function; put it back and say why, if the model does not follow."""
    model = policy.model
    before = model.config._attn_implementation
    assert before is not None  # transformers has chosen one by now
    examples = _probe_examples(policy, longest)
    padded = _per_token(policy, build_layout(examples, Layout("concatenated", policy.limits)))
    try:
        model.set_attn_implementation(SEGMENTS)
        why = _differs(policy, examples, padded)
    except Exception as error:  # whatever a model does with a name or a keyword it does not know
        why = f"its attention cannot be exchanged ({type(error).__name__}: {_first_line(error)})"
    if why is not None:
        model.set_attn_implementation(before)
        return f"{type(model).__name__} does not follow the packed layout: {why}"
    return None


def _differs(
    policy: PolicyModel, examples: list[TokenizedExample], padded: torch.Tensor
) -> str | None:
    layout = build_layout(examples, Layout("shared_prefix", policy.limits))
    packed = _per_token(policy, layout)
    layers = policy.model.config.get_text_config().num_hidden_layers
    for block in layout.blocks:
        assert block.segments is not None
        if len(block.segments.calls) != layers:
            return f"{len(block.segments.calls)} of its {layers} layers called the packed attention"
    off = (packed - padded).abs()
    mean, largest = TOLERANCES[policy.model.dtype]
    if not (off.mean() <= mean and off.max() <= largest):
        return f"log-probs differ by up to {float(off.max()):.3g} nats a token"
    return None


@torch.no_grad()
def _per_token(policy: PolicyModel, layout: PairLayout) -> torch.Tensor:
    device = next(policy.parameters()).device
    return torch.cat(pair_logps(policy, layout.to(device)).per_token).double()


def _probe_examples(policy: PolicyModel, longest: int) -> list[TokenizedExample]:
    """Three pairs, two of them on one prompt, past window and limits where rows can be."""
    config = policy.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    # The answers to the long prompt end before and behind a limit.
    crossed = [limit - 6 for limit in policy.limits.lengths if longest > limit]
    long = max(11, window + 8 if longest > window else 0, *crossed)
    generator = torch.Generator().manual_seed(0)
    top = min(config.vocab_size, 1000)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, top, (length,), generator=generator).tolist())

    def pair(prompt: tuple[int, ...], chosen: int, rejected: int) -> TokenizedExample:
        sides = (Completion(ids(chosen)), Completion(ids(rejected)))
        return TokenizedExample("probe", prompt, sides, ("chosen", "rejected"), "probe", 0)

    shared = ids(long)
    return [pair(shared, 5, 9), pair(ids(1), 1, 6), pair(shared, 7, 3)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
