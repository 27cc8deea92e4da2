"""Which rank trains on which rows, and which rows share a forward: pure functions of their lengths.

Nothing here changes which rows form a global batch, and every rank computes the same answer.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

import numpy as np

from preftune.config.dpo import Layout as LayoutName
from preftune.schema import TokenizedExample


@dataclass(frozen=True)
class RowSizes:
    """How many tokens rows have, and which of them share a prompt."""

    prompt_keys: np.ndarray
    """(rows,) uint64; rows with one key and one prompt length have the same prompt."""
    lengths: np.ndarray
    """(rows, 1 + answers) Tokens of the prompt and of each answer."""

    @classmethod
    def of(cls, examples: Iterable[TokenizedExample]) -> "RowSizes":
        """The sizes of rows that are at hand."""
        rows = [
            (e.prompt_key, [len(e.prompt_ids), *(len(c.ids) for c in e.completions)])
            for e in examples
        ]
        keys, lengths = zip(*rows, strict=True) if rows else ((), ())
        return cls(np.array(keys, dtype=np.uint64), np.array(lengths, dtype=np.int64))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @cached_property
    def prompts(self) -> list[tuple[int, int]]:
        """Of each row, what two rows with the same prompt have in common."""
        return list(zip(self.prompt_keys.tolist(), self.lengths[:, 0].tolist(), strict=True))

    @cached_property
    def answers(self) -> list[list[int]]:
        """Of each row, the tokens of its answers."""
        return self.lengths[:, 1:].tolist()

    def longest_side(self, row: int) -> int:
        """Tokens of the prompt and the longest answer."""
        return self.prompts[row][1] + max(self.answers[row])


class _Load:
    """The rows of a growing micro-batch, and the token positions that they take."""

    def __init__(self, sizes: RowSizes, layout: LayoutName) -> None:
        self.rows: list[int] = []
        self.positions = 0
        self._sizes = sizes
        self._layout: LayoutName = layout
        self._prompts: set[tuple[int, int]] = set()
        self._widest = [0] * (sizes.lengths.shape[1] - 1)

    def shares_prompt(self, row: int) -> bool:
        return self._layout == "shared_prefix" and self._sizes.prompts[row] in self._prompts

    def with_row(self, row: int) -> int:
        """Positions if `row` joined, padding included."""
        match self._layout:
            case "shared_prefix":
                prompt = 0 if self.shares_prompt(row) else self._sizes.prompts[row][1]
                return self.positions + prompt + sum(self._sizes.answers[row])
            case "concatenated":
                return (len(self.rows) + 1) * len(self._widest) * max(self._widened(row))
            case "separate":
                return (len(self.rows) + 1) * sum(self._widened(row))
            case _:
                assert_never(self._layout)

    def add(self, row: int) -> None:
        self.positions = self.with_row(row)
        self._prompts.add(self._sizes.prompts[row])
        self._widest = self._widened(row)
        self.rows.append(row)

    def _widened(self, row: int) -> list[int]:
        prompt = self._sizes.prompts[row][1]
        answers = self._sizes.answers[row]
        return [max(w, prompt + a) for w, a in zip(self._widest, answers, strict=True)]


def num_positions(rows: Iterable[int], sizes: RowSizes, layout: LayoutName) -> int:
    """Token positions that one forward of `rows` computes, padding included."""
    load = _Load(sizes, layout)
    for row in rows:
        load.add(row)
    return load.positions


def largest(
    batches: Iterable[Sequence[int]], sizes: RowSizes, layout: LayoutName
) -> tuple[int, int]:
    """Rows and token positions of the batch with the most positions."""
    positions, rows = max((num_positions(rows, sizes, layout), len(rows)) for rows in batches)
    return rows, positions


@dataclass(frozen=True)
class MicroBatching:
    """How a global batch is dealt to ranks and cut into micro-batches."""

    sizes: RowSizes
    """Of all rows of the dataset."""
    layout: LayoutName
    rows: int
    """Most rows in a micro-batch, where there is no token budget."""
    max_tokens: int | None = None
    """Most token positions of a micro-batch, padding included; a row with more stands alone."""

    def split(self, batch: Sequence[int], rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """One rank's share of a global batch, cut into micro-batches.

        Every rank gets the same number of micro-batches, because collectives must match; a rank
        with fewer gets empty ones at the end. Without a token budget that is as many as the largest
        share of rows needs.

        Args:
            batch: row indices of the global batch.
            rank: this process.
            world_size: number of processes.

        Returns:
            Lists of row indices, in forward order.
        """
        # Without a budget, `rows` bounds micro-batches, and a share may need no more of them.
        most_rows = -(-len(batch) // world_size) if self.max_tokens is None else None
        dealt = deal(batch, self.sizes, self.layout, world_size, most_rows)
        shares = [self._cut(share) for share in dealt]
        most = max(len(share) for share in shares)
        own = shares[rank]
        if world_size > 1:
            # Heavy with heavy, light with light: some engines wait for all ranks in each forward.
            own = sorted(own, key=lambda r: -num_positions(r, self.sizes, self.layout))
        return own + [[] for _ in range(most - len(own))]

    def _cut(self, rows: list[int]) -> list[list[int]]:
        if self.max_tokens is None:
            return [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]
        return first_fit(rows, self.sizes, self.layout, self.max_tokens)

    def heaviest(
        self, batches: Iterable[Sequence[int]], rank: int = 0, world_size: int = 1
    ) -> list[int]:
        """The micro-batch of this rank with the most token positions in any of the batches.

        Empty where the batches hold no row for this rank.
        """
        micro_batches = (rows for batch in batches for rows in self.split(batch, rank, world_size))
        return max(micro_batches, key=lambda rows: num_positions(rows, self.sizes, self.layout))


def deal(
    batch: Sequence[int],
    sizes: RowSizes,
    layout: LayoutName,
    world_size: int,
    most_rows: int | None = None,
) -> list[list[int]]:
    """Deal the rows of a global batch to ranks, so that each gets about as many token positions.

    The costliest row first, each to the rank with the fewest positions so far: the longest share
    exceeds the shortest possible by at most a third (Graham 1969), where `most_rows` allows it.

    Args:
        batch: row indices of the global batch.
        sizes: of all rows of the dataset.
        layout: how rows go through the model.
        world_size: number of ranks.
        most_rows: of a rank; at least the batch's over the number of ranks. None for any number.

    Returns:
        The rows of each rank, in the order of the batch.
    """
    if world_size == 1:
        return [list(batch)]
    costs = [num_positions([row], sizes, layout) for row in batch]
    places: list[list[int]] = [[] for _ in range(world_size)]
    ranks = [(0, rank) for rank in range(world_size)]
    for place in sorted(range(len(batch)), key=lambda place: -costs[place]):
        load, rank = heapq.heappop(ranks)
        places[rank].append(place)
        if most_rows is None or len(places[rank]) < most_rows:
            heapq.heappush(ranks, (load + costs[place], rank))
    return [[batch[place] for place in sorted(own)] for own in places]


def first_fit(
    rows: Sequence[int], sizes: RowSizes, layout: LayoutName, max_tokens: int
) -> list[list[int]]:
    """Cut rows into micro-batches of at most `max_tokens` token positions.

    Longest row first, each into the first micro-batch that holds its prompt and has room, else the
    first with room (first-fit decreasing, at most 11/9 of the fewest possible).
    """
    loads: list[_Load] = []
    for row in sorted(rows, key=lambda r: -sizes.longest_side(r)):
        fitting = [load for load in loads if load.with_row(row) <= max_tokens]
        if fitting:
            chosen = next((load for load in fitting if load.shares_prompt(row)), fitting[0])
        else:
            chosen = _Load(sizes, layout)
            loads.append(chosen)
        chosen.add(row)
    return [load.rows for load in loads]


def sorted_batches(
    sizes: RowSizes,
    layout: LayoutName,
    *,
    rows: int | None = None,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """All rows, where nothing asks for an order of its own: reference pass, evaluation, scoring.

    Longest first, so that a lack of memory shows at once; where prompts can be shared, rows with
    one prompt stand together.

    Args:
        sizes: of all rows.
        layout: how they go through the model.
        rows: most rows of a batch; None for any number.
        max_tokens: most token positions of a batch, padding included; a row with more stands
            alone. None for any number.
    """
    batches: list[_Load] = []
    for row in _longest_first(sizes, layout):
        last = batches[-1] if batches else None
        full = last is None or (rows is not None and len(last.rows) >= rows)
        if not full and max_tokens is not None:
            full = last is not None and last.with_row(row) > max_tokens
        if full:
            last = _Load(sizes, layout)
            batches.append(last)
        assert last is not None
        last.add(row)
    return [batch.rows for batch in batches]


def _longest_first(sizes: RowSizes, layout: LayoutName) -> list[int]:
    order = sorted(range(len(sizes)), key=lambda row: -sizes.longest_side(row))
    if layout != "shared_prefix":
        return order
    groups: dict[tuple[int, int], list[int]] = {}
    for row in order:
        groups.setdefault(sizes.prompts[row], []).append(row)
    return [row for group in groups.values() for row in group]
