"""The plain object that says what one forward computes, and its builders.

A `PairLayout` is built on the CPU from token ids alone. The model reads it (`model.forward`);
losses, config and loop never look inside. Every way to lay out rows is another builder of the same
object, so a way to the same numbers is never a branch elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, assert_never

import torch
from jaxtyping import Int
from torch import Tensor

from preftune.config.dpo import Layout as LayoutName
from preftune.schema import Completion, TokenizedExample


class Span(NamedTuple):
    """A run of tokens of a packed row, and what they attend to: a prefix, and causally themselves.

    The tokens of a span stand at the positions after its prefix, so it is the end of an ordinary
    causal sequence `prefix + span`, whatever lies between the two in the row.
    """

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int
    """Equal to `prefix_start` where there is no prefix."""


@dataclass(frozen=True)
class Segments:
    """Attention of a packed row: its spans, in order and without gaps.

    Example: prompt of 2 tokens with answers of 2 and 1, `[p p c c r]`:

        Span(0, 4, 0, 0)    # prompt and first answer: plain causal attention
        Span(4, 5, 0, 2)    # second answer: sees the prompt and itself, never the first answer
    """

    spans: tuple[Span, ...]
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What the layers of one forward share, by kind and device: masks, index arrays."""
    calls: list[Any] = field(default_factory=list, compare=False, repr=False)
    """What each call of the attention function asked for (`model.attention.LayerCall`): how the
    probe sees that every layer took part, and what kernels must be able to express."""


@dataclass(frozen=True)
class Block:
    """One call of the model: rows of token ids and what to read from the result.

    Shapes: `rows` x `width` tokens, `completions` answers, `scored` tokens that the loss reads.
    """

    input_ids: Int[Tensor, "rows width"]
    """Rows padded on the right with token 0. Causal attention keeps real tokens from seeing the
    padding, and no padded position is scored, so no mask is needed and none is built."""
    score_positions: Int[Tensor, " scored"]
    """Index into the flattened rows of the position whose output predicts each label."""
    labels: Int[Tensor, " scored"]
    """The scored tokens, answer after answer."""
    lengths: Int[Tensor, " completions"]
    """Scored tokens of each answer, in the order of `labels`."""
    num_scored: tuple[int, ...]
    """`lengths` on the host, for splitting without waiting for the device."""
    completion_ids: tuple[int, ...]
    """Which answer of the micro-batch each entry of `lengths` is."""
    position_ids: Int[Tensor, "rows width"] | None = None
    """Of a packed row; None counts from 0 in every row."""
    segments: Segments | None = None
    """Of a packed row; None is causal attention in every row."""

    def to(self, device: torch.device) -> "Block":
        """The same block with its tensors on `device`."""
        return Block(
            self.input_ids.to(device, non_blocking=True),
            self.score_positions.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            self.num_scored,
            self.completion_ids,
            None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
            self.segments,
        )


@dataclass(frozen=True)
class PairLayout:
    """What one micro-batch computes.

    Answers are numbered example by example: with pairs, answer 2i is the chosen and 2i+1 the
    rejected one of pair i.

    Example: one pair with prompt `[5, 6]`, chosen `[7, 8]`, rejected `[9]`, concatenated:

        input_ids        [[5, 6, 7, 8],
                          [5, 6, 9, 0]]
        score_positions  [1, 2, 5]        # the position before each scored token, flattened
        labels           [7, 8, 9]
        lengths          [2, 1]
        completion_ids   (0, 1)
    """

    blocks: tuple[Block, ...]
    num_completions: int
    num_tokens: int
    """Real tokens forwarded, prompts counted as often as they are computed; no padding."""

    def to(self, device: torch.device) -> "PairLayout":
        """The same layout with its tensors on `device`."""
        blocks = tuple(block.to(device) for block in self.blocks)
        return PairLayout(blocks, self.num_completions, self.num_tokens)


def build_layout(examples: Sequence[TokenizedExample], name: LayoutName) -> PairLayout:
    """Lay out the answers of a micro-batch.

    Args:
        examples: the rows of the micro-batch; all with the same number of answers.
        name: `shared_prefix` packs all rows into one, without padding, each prompt once;
            `concatenated` runs all answers in one call of the model, padded to the longest;
            `separate` makes one call for the chosen and one for the rejected answers, which pads
            less where the two sides differ in length.

    Returns:
        The layout, on the CPU.
    """
    if name == "shared_prefix":
        block = _packed_block(examples)
        return PairLayout((block,), len(block.completion_ids), block.input_ids.shape[1])
    sequences = [
        _Sequence(example.prompt_ids, completion.ids, completion.scored)
        for example in examples
        for completion in example.completions
    ]
    everyone = list(range(len(sequences)))
    match name:
        case "concatenated":
            groups = [everyone]
        case "separate":
            per_example = len(examples[0].completions) if examples else 1
            groups = [everyone[side::per_example] for side in range(per_example)]
        case _:
            assert_never(name)
    blocks = tuple(_padded_block(sequences, group) for group in groups)
    return PairLayout(blocks, len(sequences), sum(s.length for s in sequences))


def _packed_block(examples: Sequence[TokenizedExample]) -> Block:
    """All examples in one row; those with the same prompt share its tokens."""
    answers: dict[tuple[int, ...], list[tuple[int, Completion]]] = {}
    index = 0
    for example in examples:
        for completion in example.completions:
            answers.setdefault(example.prompt_ids, []).append((index, completion))
            index += 1
    row = _PackedRow()
    for prompt, completions in answers.items():
        row.add(prompt, completions)
    return row.block()


class _PackedRow:
    """Tokens, positions and spans of a packed row while it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.spans: list[Span] = []
        self.score_positions: list[int] = []
        self.labels: list[int] = []
        self.lengths: list[int] = []
        self.completion_ids: list[int] = []

    def add(self, prompt: Sequence[int], completions: Sequence[tuple[int, Completion]]) -> None:
        """Append a prompt, and behind it its answers, each at the positions after the prompt."""
        start, stop = len(self.ids), len(self.ids) + len(prompt)
        self._append(prompt, first_position=0)
        for number, (index, completion) in enumerate(completions):
            begin = len(self.ids)
            self._append(completion.ids, first_position=len(prompt))
            # The first answer stands right behind its prompt: one causal span for both.
            span = (start, start, start) if number == 0 else (begin, start, stop)
            self.spans.append(Span(span[0], len(self.ids), span[1], span[2]))
            scored = [
                offset
                for offset in range(len(completion.ids))
                if completion.scored is None or completion.scored[offset]
            ]
            # The prompt's last token predicts the first token of every answer.
            self.score_positions += [begin + t - 1 if t else stop - 1 for t in scored]
            self.labels += [completion.ids[t] for t in scored]
            self.lengths.append(len(scored))
            self.completion_ids.append(index)

    def _append(self, ids: Sequence[int], first_position: int) -> None:
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))

    def block(self) -> Block:
        """The row as tensors."""
        return Block(
            torch.tensor([self.ids]),
            torch.tensor(self.score_positions, dtype=torch.long),
            torch.tensor(self.labels, dtype=torch.long),
            torch.tensor(self.lengths, dtype=torch.long),
            tuple(self.lengths),
            tuple(self.completion_ids),
            torch.tensor([self.positions]),
            Segments(tuple(self.spans)),
        )


@dataclass(frozen=True, slots=True)
class _Sequence:
    prompt: Sequence[int]
    completion: Sequence[int]
    scored: Sequence[bool] | None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion)


def _padded_block(sequences: list[_Sequence], group: list[int]) -> Block:
    width = max(sequences[i].length for i in group)
    input_ids = torch.zeros(len(group), width, dtype=torch.long)
    positions: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for row, index in enumerate(group):
        sequence = sequences[index]
        ids = [*sequence.prompt, *sequence.completion]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        first = len(sequence.prompt)
        scored = [
            first + offset
            for offset in range(len(sequence.completion))
            if sequence.scored is None or sequence.scored[offset]
        ]
        # The output at position t - 1 predicts token t: this is the one place of the shift.
        positions += [row * width + token - 1 for token in scored]
        labels += [ids[token] for token in scored]
        lengths.append(len(scored))
    return Block(
        input_ids,
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(lengths, dtype=torch.long),
        tuple(lengths),
        tuple(group),
    )
