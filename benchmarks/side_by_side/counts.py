"""Tokens and arithmetic of a batch of pairs, by the way it is laid out. Pure.

A multiply and an add are two operations. Counted are matrix products: the backbone's weights, the
head's, and attention's scores and sums. Norms, activations, softmax and the optimizer are not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Layout: TypeAlias = Literal["packed", "concatenated", "separate", "trl", "trl_compact"]


@dataclass(frozen=True)
class Lengths:
    """Tokens of one pair."""

    prompt: int
    chosen: int
    rejected: int
    prompt_key: int
    """Equal for pairs on the same prompt."""

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens of each answer with its prompt."""
        return self.prompt + self.chosen, self.prompt + self.rejected


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic of a model depends on."""

    backbone: int
    """Weights of the matrix products of all layers; embeddings and norms left out."""
    head: int
    """Weights of the product that makes logits."""
    layers: int
    width: int
    """Query heads times their size."""


@dataclass(frozen=True)
class Work:
    """What one forward of a batch computes."""

    tokens: int
    """Positions that go through the backbone, padding included."""
    scored: int
    """Positions that go through the head."""
    scores: int
    """Pairs of query and key for which attention computes a score, in one layer and head."""
    again: "Work | None" = None
    """The part whose forward the backward runs once more."""

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(
            self.tokens + other.tokens, self.scored + other.scored, self.scores + other.scores
        )


def work_of(batch: Sequence[Lengths], layout: Layout) -> Work:
    """What one forward of `batch` computes.

    Causal attention without a mask skips what lies above the diagonal. With a mask, which TRL's
    padding and a packed answer after another one need, the kernels compute the whole rectangle.

    Args:
        batch: the pairs of one forward.
        layout: preftune's three; `trl` is TRL where it scores every position (CPU), `trl_compact`
            where it scores those of the answers (GPU).
    """
    completions = sum(pair.chosen + pair.rejected for pair in batch)
    longest = [max(side) for side in zip(*(pair.sides for pair in batch), strict=True)]
    rows = len(batch)
    match layout:
        case "packed":
            return _packed(batch)
        case "concatenated":
            width = max(longest)
            return Work(2 * rows * width, completions, 2 * rows * _causal(width))
        case "separate":
            chosen = sum(pair.chosen for pair in batch)
            first, second = (
                Work(rows * width, scored, rows * _causal(width))
                for width, scored in zip(longest, (chosen, completions - chosen), strict=True)
            )
            return replace(first + second, again=first)
        case "trl" | "trl_compact":
            width = max(longest)
            scored = completions if layout == "trl_compact" else 2 * rows * (width - 1)
            return Work(2 * rows * width, scored, 2 * rows * width * width)


def _packed(batch: Sequence[Lengths]) -> Work:
    tokens = scored = scores = 0
    seen: set[int] = set()
    for pair in batch:
        scored += pair.chosen + pair.rejected
        answers = [pair.chosen, pair.rejected]
        if pair.prompt_key not in seen:
            seen.add(pair.prompt_key)
            first = answers.pop(0)
            tokens += pair.prompt + first
            scores += _causal(pair.prompt + first)
        tokens += sum(answers)
        scores += sum(answer * (pair.prompt + answer) for answer in answers)
    return Work(tokens, scored, scores)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


def step_flops(
    work: Work, shape: ModelShape, *, checkpointing: bool = False, online_reference: bool = False
) -> float:
    """Arithmetic of a training step as both tools run it.

    The backward is twice the forward; both tools compute the head's product once more in it, so
    that logits need not be kept.

    Args:
        work: of one forward.
        shape: of the model.
        checkpointing: the backward repeats the backbone's forward.
        online_reference: the reference runs in the step.
    """
    flops = 3 * forward_flops(work, shape) + 2.0 * shape.head * work.scored
    if work.again is not None:
        flops += forward_flops(work.again, shape)
    if checkpointing:
        flops += forward_flops(Work(work.tokens, 0, work.scores), shape)
    if online_reference:
        flops += forward_flops(work, shape)
    return flops


def forward_flops(work: Work, shape: ModelShape) -> float:
    """Arithmetic of one forward."""
    return (
        2.0 * shape.backbone * work.tokens
        + 2.0 * shape.head * work.scored
        + 4.0 * shape.layers * shape.width * work.scores
    )


def needed_flops(batch: Sequence[Lengths], shape: ModelShape) -> float:
    """Arithmetic that the loss and its gradient need: each prompt once, no padding, logits once."""
    work = work_of(batch, "packed")
    seen: set[int] = set()
    scores = 0
    for pair in batch:
        scores += sum(n * pair.prompt + _causal(n) for n in (pair.chosen, pair.rejected))
        if pair.prompt_key not in seen:
            seen.add(pair.prompt_key)
            scores += _causal(pair.prompt)
    return 3 * forward_flops(Work(work.tokens, work.scored, scores), shape)


def token_counts(batches: Iterable[Sequence[Lengths]]) -> dict[str, int]:
    """Tokens of all batches: padded as TRL has them, unpadded, with shared prompts, scored."""
    totals = {"padded": 0, "unpadded": 0, "shared": 0, "scored": 0}
    for batch in batches:
        packed = work_of(batch, "packed")
        totals["padded"] += work_of(batch, "trl").tokens
        totals["unpadded"] += sum(sum(pair.sides) for pair in batch)
        totals["shared"] += packed.tokens
        totals["scored"] += packed.scored
    return totals
