"""The plain object that says what one forward computes, and its builders.

A `PairLayout` is built on the CPU from token ids alone. The model reads it (`model.forward`);
losses, config and loop never look inside. Every way to lay out rows is another builder of the same
object, so a way to the same numbers is never a branch elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.batching.shards import RowPart, Shard, make_shard
from preftune.config.dpo import Layout as LayoutName
from preftune.schema import Completion, TokenizedExample


class Span(NamedTuple):
    """A run of tokens of a packed row, and what they attend to: a prefix, and causally themselves.

    The tokens of a span stand at the positions after its prefix, so it is the end of an ordinary
    causal sequence `prefix + span`, whatever lies between the two in the row. A prefix is the
    beginning of an earlier span.
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
    weights: Float[Tensor, " scored"] | None = None
    """fp64: how much each scored token weighs in an answer's weighted sum; None: 1 each."""
    row_lengths: Int[Tensor, " rows"] | None = None
    """Tokens of each row that are no padding; None: all."""
    shard: Shard | None = None
    """What this process computes of a packed row that several share; None: all of it."""

    @property
    def real_tokens(self) -> Bool[Tensor, " tokens"]:
        """Which positions of the flattened rows are no padding."""
        if self.row_lengths is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool).flatten()
        columns = torch.arange(self.input_ids.shape[1], device=self.row_lengths.device)
        return (columns < self.row_lengths.unsqueeze(1)).flatten()

    def to(self, device: torch.device) -> "Block":
        """The same block with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Block":
        """The same block with its tensors in page-locked memory of the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Block":
        tensors = {k: change(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.shard is None:
            return replace(self, **tensors)
        parts = {k: change(v) for k, v in vars(self.shard).items()}
        return replace(self, shard=Shard(**parts), **tensors)


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
    one_at_a_time: bool = False
    """Whether activations of one block exist at a time: all but the last block's are made again in
    the backward."""

    def to(self, device: torch.device) -> "PairLayout":
        """The same layout with its tensors on `device`."""
        return replace(self, blocks=tuple(block.to(device) for block in self.blocks))

    def pinned(self) -> "PairLayout":
        """The same layout with its tensors in page-locked memory of the host."""
        return replace(self, blocks=tuple(block.pinned() for block in self.blocks))


@dataclass(frozen=True)
class LengthLimits:
    """Which sequences may not share a call of the model, by their lengths.

    Some kinds of RoPE take their frequencies from the longest sequence of a call: beside a long one
    a short one would have other log-probs than alone. Empty for all other models.
    """

    switches: tuple[int, ...] = ()
    """longrope: sequences longer than this have one set of frequencies, the others another."""
    start: int | None = None
    """dynamic NTK: past this every length has frequencies of its own."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The longest lengths that are as in any other model."""
        return self.switches if self.start is None else (*self.switches, self.start)

    def key(self, length: int) -> tuple[int, ...]:
        """Equal for lengths that may share a call."""
        own = () if self.start is None else (max(length, self.start),)
        return (*(int(length > switch) for switch in self.switches), *own)


@dataclass(frozen=True)
class Layout:
    """How the rows of any micro-batch go through a model."""

    name: LayoutName
    limits: LengthLimits = LengthLimits()
    ld_alpha: float = 1.0
    """What a token past the length of its row's shortest answer weighs in the weighted sums."""
    scores_prompt: bool = False
    """Whether each row has one more answer, numbered behind its others: its own prompt, of which
    all tokens but the first are scored, in the place where the model reads them anyway."""
    part: RowPart | None = None
    """Which process lays them out, where several share each packed row."""


def token_weights(num_scored: Sequence[int], ld_alpha: float) -> list[list[float]]:
    """How much the scored tokens of one row's answers weigh (LD-DPO, arXiv:2409.06411).

    Args:
        num_scored: of each answer.
        ld_alpha: weight of a token past the length that all of them reach.

    Returns:
        One weight a scored token, answer by answer.
    """
    shared = min(num_scored)
    return [[1.0] * shared + [ld_alpha] * (number - shared) for number in num_scored]


def build_layout(examples: Sequence[TokenizedExample], layout: Layout | LayoutName) -> PairLayout:
    """Lay out the answers of a micro-batch.

    Args:
        examples: the rows of the micro-batch; all with the same number of answers.
        layout: `shared_prefix` packs all rows into one, without padding, each prompt once;
            `concatenated` runs all answers in one call of the model, padded to the longest;
            `separate` makes one call for the chosen and one for the rejected answers, and keeps
            the activations of one call at a time. Its limits make several calls of one. A bare name
            has no limits.

    Returns:
        The layout, on the CPU.
    """
    if isinstance(layout, str):
        layout = Layout(layout)
    sequences = _sequences(examples, layout.scores_prompt)
    weights = None if layout.ld_alpha == 1 else _weights(examples, layout)
    groups = [sequences]
    if layout.name == "separate":
        per_example = len(examples[0].completions) if examples else 1
        groups = [sequences[side::per_example] for side in range(per_example)]
    groups = [part for group in groups for part in _kept_apart(group, layout.limits)]
    if layout.name == "shared_prefix":
        blocks = tuple(_shared(_packed_block(group, weights), layout) for group in groups)
        num_tokens = sum(block.input_ids.numel() for block in blocks)
    else:
        blocks = tuple(_padded_block(group, weights) for group in groups)
        num_tokens = sum(sequence.length for sequence in sequences)
    num_answers = len(sequences) + layout.scores_prompt * len(examples)
    return PairLayout(blocks, num_answers, num_tokens, layout.name == "separate")


def _sequences(examples: Sequence[TokenizedExample], scores_prompt: bool) -> list["_Sequence"]:
    """All answers behind their prompts, example by example."""
    sequences = []
    number = 0
    for example in examples:
        behind = number + len(example.completions)
        for side, completion in enumerate(example.completions):
            prompt_number = behind if scores_prompt and side == 0 else None
            sequences.append(_Sequence(example.prompt_ids, completion, number, prompt_number))
            number += 1
        number += scores_prompt
    return sequences


def _weights(examples: Sequence[TokenizedExample], layout: Layout) -> list[list[float]]:
    """The weights of each answer's scored tokens, in the numbering of answers."""
    weights = []
    for example in examples:
        weights += token_weights([c.num_scored for c in example.completions], layout.ld_alpha)
        if layout.scores_prompt:
            weights.append([1.0] * (len(example.prompt_ids) - 1))
    return weights


def _weights_of(weights: list[list[float]] | None, answers: Sequence[int]) -> Tensor | None:
    """Of some of the answers, one after the other."""
    if weights is None:
        return None
    return torch.tensor([w for i in answers for w in weights[i]], dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A prompt and one answer to it."""

    prompt: tuple[int, ...]
    completion: Completion
    number: int
    """Of the answer."""
    prompt_number: int | None
    """Of the prompt, where it is scored here as an answer of its own."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.completion.ids)

    @property
    def scored(self) -> list[int]:
        """Which tokens of the answer the loss reads."""
        ids, scored = self.completion.ids, self.completion.scored
        return [offset for offset in range(len(ids)) if scored is None or scored[offset]]


def _kept_apart(sequences: list[_Sequence], limits: LengthLimits) -> list[list[_Sequence]]:
    """In parts that may share a call, shorter sequences first."""
    parts: dict[tuple[int, ...], list[_Sequence]] = {}
    for sequence in sequences:
        parts.setdefault(limits.key(sequence.length), []).append(sequence)
    return [parts[key] for key in sorted(parts)]


class _Scored:
    """What the loss reads of a block, answer after answer, while it grows."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self.labels: list[int] = []
        self.lengths: list[int] = []
        self.numbers: list[int] = []

    def add(self, number: int, positions: list[int], labels: Sequence[int]) -> None:
        """Append an answer: the positions whose output predicts its scored tokens, and those."""
        self.positions += positions
        self.labels += labels
        self.lengths.append(len(labels))
        self.numbers.append(number)

    def add_prompt(self, sequence: _Sequence, start: int) -> None:
        """Append the prompt that begins at `start`, if it is an answer of its own."""
        if sequence.prompt_number is not None:
            length = len(sequence.prompt)
            positions = list(range(start, start + length - 1))
            self.add(sequence.prompt_number, positions, sequence.prompt[1:])

    def block(self, weights: list[list[float]] | None, **rows: Any) -> Block:
        """The block of these rows."""
        return Block(
            score_positions=torch.tensor(self.positions, dtype=torch.long),
            labels=torch.tensor(self.labels, dtype=torch.long),
            lengths=torch.tensor(self.lengths, dtype=torch.long),
            num_scored=tuple(self.lengths),
            completion_ids=tuple(self.numbers),
            weights=_weights_of(weights, self.numbers),
            **rows,
        )


def _packed_block(sequences: list[_Sequence], weights: list[list[float]] | None) -> Block:
    """One row; sequences with the same prompt share its tokens."""
    by_prompt: dict[tuple[int, ...], list[_Sequence]] = {}
    for sequence in sequences:
        by_prompt.setdefault(sequence.prompt, []).append(sequence)
    row = _PackedRow()
    for prompt, answers in by_prompt.items():
        row.add(prompt, answers)
    return row.scored.block(
        weights,
        input_ids=torch.tensor([row.ids]),
        position_ids=torch.tensor([row.positions]),
        segments=Segments(tuple(row.spans)),
    )


def _shared(block: Block, layout: Layout) -> Block:
    """With this process' part, where several share the row."""
    if layout.part is None or block.position_ids is None:
        return block
    row = block.input_ids, block.position_ids, block.score_positions
    same_longest = bool(layout.limits.lengths)
    return replace(block, shard=make_shard(*row, layout.part, same_longest=same_longest))


class _PackedRow:
    """Tokens, positions and spans of a packed row while it grows."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.spans: list[Span] = []
        self.scored = _Scored()

    def add(self, prompt: Sequence[int], answers: Sequence[_Sequence]) -> None:
        """Append a prompt, and behind it its answers, each at the positions after the prompt."""
        start, stop = len(self.ids), len(self.ids) + len(prompt)
        self._append(prompt, first_position=0)
        for order, sequence in enumerate(answers):
            ids, scored = sequence.completion.ids, sequence.scored
            begin = len(self.ids)
            self._append(ids, first_position=len(prompt))
            # The first answer stands right behind its prompt: one causal span for both.
            span = (start, start, start) if order == 0 else (begin, start, stop)
            self.spans.append(Span(span[0], len(self.ids), span[1], span[2]))
            # The prompt's last token predicts the first token of every answer.
            positions = [begin + t - 1 if t else stop - 1 for t in scored]
            self.scored.add(sequence.number, positions, [ids[t] for t in scored])
            self.scored.add_prompt(sequence, start)

    def _append(self, ids: Sequence[int], first_position: int) -> None:
        self.ids += ids
        self.positions += range(first_position, first_position + len(ids))


def _padded_block(sequences: list[_Sequence], weights: list[list[float]] | None) -> Block:
    width = max(sequence.length for sequence in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    block = _Scored()
    for row, sequence in enumerate(sequences):
        ids = [*sequence.prompt, *sequence.completion.ids]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        first = len(sequence.prompt)
        scored = [first + offset for offset in sequence.scored]
        # The output at position t - 1 predicts token t.
        positions = [row * width + token - 1 for token in scored]
        block.add(sequence.number, positions, [ids[token] for token in scored])
        block.add_prompt(sequence, row * width)
    lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.long)
    return block.block(weights, input_ids=input_ids, row_lengths=lengths)
