"""Tokenised rows as Arrow columns: in memory, or mapped from disk whatever the size of the data."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash

from preftune.batching.micro_batches import RowSizes
from preftune.data.mismatched import mismatched_rows
from preftune.data.reasons import Dropped, DropReason
from preftune.data.truncate import Limits, cut_completion, truncate
from preftune.errors import DataError
from preftune.schema import Completion, TokenizedExample

# pyarrow makes these functions while it is imported, out of the type checker's sight.
compute: Any = pyarrow.compute

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),  # null: the dataset's own name
        (
            "reason",
            pa.string(),
        ),  # why the row was dropped; null: it was kept, and what follows is set
        ("detail", pa.string()),
        ("is_text", pa.bool_()),
        ("prompt_key", pa.uint64()),
        ("content_key", pa.uint64()),
        ("highest_id", pa.int32()),
        ("weight", pa.float64()),
        ("margin", pa.float64()),  # null: the data has none
        ("roles", pa.list_(pa.string())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(pa.list_(pa.int32()))),
        ("scored", pa.list_(pa.list_(pa.bool_()))),
    ]
)


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """What became of one raw row."""

    result: TokenizedExample | Dropped
    is_text: bool = False
    """Whether it is plain text, to which no chat template applies."""


def make_table(rows: Iterable[TokenizedRow], dataset: str) -> pa.Table:
    """Rows as columns of `SCHEMA`.

    Args:
        rows: of one dataset, in order.
        dataset: its name, which rows of no further source carry.
    """
    records = [_record(row, dataset) for row in rows]
    return pa.Table.from_pylist(records, schema=SCHEMA)


def _record(row: TokenizedRow, dataset: str) -> dict[str, Any]:
    result = row.result
    if isinstance(result, Dropped):
        return {"row_id": result.row_id, "reason": result.reason.value, "detail": result.detail}
    completions = result.completions
    return {
        "row_id": result.row_id,
        "source": None if result.source == dataset else result.source,
        "is_text": row.is_text,
        "prompt_key": result.prompt_key,
        "content_key": content_key(result),
        "highest_id": max(max(result.prompt_ids), *(max(c.ids) for c in completions)),
        "weight": result.weight,
        "margin": result.margin,
        "roles": result.roles,
        "prompt_ids": result.prompt_ids,
        "completions": [c.ids for c in completions],
        "scored": [c.scored for c in completions],
    }


def content_key(example: TokenizedExample) -> int:
    """64-bit hash of token ids, masks and the label of a lone answer; lengths keep parts apart."""
    parts: list[int] = [len(example.prompt_ids), *example.prompt_ids, len(example.completions)]
    for completion in example.completions:
        parts += [len(completion.ids), *completion.ids]
        parts += [-1] if completion.scored is None else [int(s) for s in completion.scored]
    if len(example.completions) == 1:
        parts.append(int(example.roles[0] == "chosen"))
    return xxhash.xxh3_64_intdigest(np.asarray(parts, dtype=np.int64).tobytes())


class TokenRows(Sequence[TokenizedExample]):
    """Rows picked from tables; each is read, and cut to its limits, when it is asked for."""

    def __init__(
        self,
        tables: Sequence[pa.Table],
        names: Sequence[str],
        picks: Sequence[np.ndarray],
        limits: Limits,
    ) -> None:
        """Pick rows.

        Args:
            tables: of `SCHEMA`, one a dataset.
            names: of the datasets.
            picks: per table, the positions of its rows, none of them a dropped one.
            limits: rows over them are cut; those that they drop are not picked.
        """
        starts = np.cumsum([0, *(len(table) for table in tables)])[:-1]
        self._table = pa.concat_tables(tables)
        self._starts = starts
        self._positions = np.concatenate(
            [start + np.asarray(p, np.int64) for start, p in zip(starts, picks, strict=True)]
        )
        self._names = tuple(names)
        self._origins = np.repeat(np.arange(len(tables), dtype=np.int32), [len(p) for p in picks])
        self._limits = limits
        self._partners: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> "TokenRows":
        """The rows at `rows`, which may repeat, in that order.

        A row keeps its mismatched answer, also where the row it is of is not taken.
        """
        taken = self._copy()
        taken._positions, taken._origins = self._positions[rows], self._origins[rows]
        if self._partners is not None:
            taken._partners = self._partners[rows]
        return taken

    def with_mismatched(self, seed: int) -> "TokenRows":
        """The same rows, each with a second answer that was given to another prompt.

        It is the whole answer of the next row with another prompt in an order that the seed
        shuffles, cut at its end to what the limits leave behind the row's own prompt. Where all
        rows have one prompt, it is that of another row. Rows taken from the result keep theirs.

        Args:
            seed: of the order.

        Raises:
            DataError: there is no other row.

        Source: KTO, arXiv:2402.01306: such answers estimate how far the policy is from the
        reference.
        """
        assert self.num_answers == 1, "pairs have no mismatched answers"
        partners = mismatched_rows(self.prompt_keys, self._positions, seed)
        if partners is None:
            raise DataError(
                f"{' + '.join(self._names)}: {self.row_id(0)} is the only row, and the loss "
                "compares each answer with that of another row; give two rows or more"
            )
        mismatched = self._copy()
        mismatched._partners = self._positions[partners]
        return mismatched

    def _copy(self) -> "TokenRows":
        other = copy(self)
        for cached in ("lengths", "num_scored", "is_cut", "sizes"):
            other.__dict__.pop(cached, None)
        return other

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenRows": ...
    def __getitem__(self, index: int | slice) -> "TokenizedExample | TokenRows":
        """One row, or a range of them that is not read yet."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = self._cut(index)
        if self._partners is None:
            return row
        answers = (*row.completions, self._mismatched(index, len(row.prompt_ids)))
        return replace(row, completions=answers, roles=(*row.roles, "mismatched"))

    def _cut(self, index: int) -> TokenizedExample:
        cut = truncate(self.whole(index), self._limits)
        assert not isinstance(cut, Dropped), "rows that the limits drop are not picked"
        return cut

    def _mismatched(self, index: int, prompt: int) -> Completion:
        """The mismatched answer of a row, behind a prompt of so many tokens."""
        assert self._partners is not None
        whole = _completions(self._table, int(self._partners[index]))[0]
        longest = self._limits.longest
        answer = cut_completion(whole, None if longest is None else longest - prompt)
        # An answer of many turns may lose every scored token; those left are as good a sample.
        return answer if answer.num_scored else replace(answer, scored=None)

    def whole(self, index: int) -> TokenizedExample:
        """One row before any cut, with no mismatched answer."""
        return read_row(self._table, int(self._positions[index]), self._names[self._origins[index]])

    def row_id(self, index: int) -> str:
        """Id of one row, which is not read whole."""
        return self._table.column("row_id")[int(self._positions[index])].as_py()

    @property
    def table(self) -> pa.Table:
        """Every row that was read, dropped ones too, source after source."""
        return self._table

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return self._names

    @property
    def starts(self) -> np.ndarray:
        """(sources,) Where the rows of each source start in `table`."""
        return self._starts

    @property
    def positions(self) -> np.ndarray:
        """(rows,) Where each row stands in `table`."""
        return self._positions

    @property
    def limits(self) -> Limits:
        """Rows over them are cut."""
        return self._limits

    @property
    def origins(self) -> np.ndarray:
        """(rows,) Which of the tables each row is from."""
        return self._origins

    @property
    def row_ids(self) -> list[str]:
        """(rows,)."""
        return self._table.column("row_id").take(self._positions).to_pylist()

    @property
    def sources(self) -> list[str]:
        """(rows,) What each row says it is from, else the name of its dataset."""
        own = self._table.column("source").take(self._positions).to_pylist()
        return [s or self._names[at] for s, at in zip(own, self._origins, strict=True)]

    @property
    def prompt_keys(self) -> np.ndarray:
        """(rows,) uint64; rows that share a prompt share it."""
        return self._column("prompt_key")

    @property
    def content_keys(self) -> np.ndarray:
        """(rows,) uint64 hash of ids, masks and the label of a lone answer, before any cut."""
        return self._column("content_key")

    @property
    def weights(self) -> np.ndarray:
        """(rows,) float64 factors of the rows' losses, 1 where the data has none."""
        return self._column("weight")

    @property
    def margins(self) -> np.ndarray:
        """(rows,) float64 by how much the chosen answers are better; nan where none is given.

        In units of reward.
        """
        return self._column("margin", np.nan)

    @property
    def roles(self) -> np.ndarray:
        """(rows,) Of each row, the role of its first answer."""
        first = compute.list_element(self._table.column("roles").take(self._positions), 0)
        return first.to_numpy(zero_copy_only=False)

    @property
    def is_text(self) -> np.ndarray:
        """(rows,) Which rows are plain text."""
        return self._column("is_text", False).astype(bool)

    @property
    def highest_id(self) -> int:
        """The largest token id, mismatched answers' among them."""
        highest = int(self._column("highest_id").max())
        if self._partners is None:
            return highest
        return max(highest, int(self._column("highest_id", at=self._partners).max()))

    @property
    def num_answers(self) -> int:
        """Answers of each row."""
        kept = compute.list_value_length(self._table.column("completions"))
        return int(compute.max(kept).as_py() or 0) + (self._partners is not None)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows, 1 + answers) Tokens of the prompt and of each answer, after any cut."""
        whole = whole_lengths(self._table)
        lengths = whole[self._positions]
        for row in np.flatnonzero(over_limits(lengths, self._limits)):
            example = self._cut(int(row))
            lengths[row] = [len(example.prompt_ids), *(len(c.ids) for c in example.completions)]
        if self._partners is None:
            return lengths
        mismatched = whole[self._partners, 1]
        if self._limits.longest is not None:
            mismatched = np.minimum(mismatched, self._limits.longest - lengths[:, 0])
        return np.column_stack([lengths, mismatched])

    @cached_property
    def num_scored(self) -> np.ndarray:
        """(rows, answers) Tokens of each answer that the loss reads, after any cut.

        Only rows with an answer of many turns are read.
        """
        numbers = self.lengths[:, 1:].copy()
        in_table = _has_masks(self._table)
        has_masks = in_table[self._positions]
        if self._partners is not None:
            has_masks |= in_table[self._partners]
        for row in np.flatnonzero(has_masks):
            numbers[row] = [answer.num_scored for answer in self[int(row)].completions]
        return numbers

    @cached_property
    def is_cut(self) -> np.ndarray:
        """(rows,) Which rows are cut to their limits, mismatched answers left aside."""
        return over_limits(whole_lengths(self._table)[self._positions], self._limits)

    @property
    def longest_side(self) -> np.ndarray:
        """(rows,) Tokens of the prompt and the longest answer."""
        return self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)

    @cached_property
    def sizes(self) -> RowSizes:
        """What micro-batches are cut by."""
        return RowSizes(self.prompt_keys, self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, a prompt counted once an answer."""
        answers = self.lengths.shape[1] - 1
        return int(self.lengths[:, 0].sum() * answers + self.lengths[:, 1:].sum())

    def fingerprint(self) -> str:
        """xxh3_128, in hex, of content, weights, margins, cuts, mismatched answers and order."""
        digest = xxhash.xxh3_128(self.content_keys.tobytes())
        if self.is_cut.any():
            digest.update(self._limits.truncation.encode() + self.lengths.tobytes())
        if (self.weights != 1).any():
            digest.update(b"weights" + self.weights.tobytes())
        if not np.isnan(self.margins).all():
            digest.update(b"margins" + self.margins.tobytes())
        if self._partners is not None:
            others = self._column("content_key", at=self._partners)
            digest.update(b"mismatched" + others.tobytes() + self.lengths[:, -1].tobytes())
        return digest.hexdigest()

    def _column(
        self, name: str, fill: float | bool = 0, at: np.ndarray | None = None
    ) -> np.ndarray:
        """The values of a column at positions of the table, its rows' own unless others are given.

        Dropped rows, which no position is of, hold nulls.
        """
        values = compute.fill_null(self._table.column(name), fill).to_numpy()
        return values[self._positions if at is None else at]


def read_row(table: pa.Table, position: int, dataset: str) -> TokenizedExample:
    """One kept row of a table.

    Args:
        table: of `SCHEMA`.
        position: of the row; it must not be a dropped one.
        dataset: its name.
    """

    def value(name: str) -> Any:
        return table.column(name)[position]

    return TokenizedExample(
        row_id=value("row_id").as_py(),
        prompt_ids=_ids(value("prompt_ids")),
        completions=_completions(table, position),
        roles=tuple(value("roles").as_py()),
        source=value("source").as_py() or dataset,
        prompt_key=value("prompt_key").as_py(),
        weight=value("weight").as_py(),
        margin=value("margin").as_py(),
    )


def _completions(table: pa.Table, position: int) -> tuple[Completion, ...]:
    """The answers of one kept row."""
    pairs = zip(
        table.column("completions")[position], table.column("scored")[position], strict=True
    )
    return tuple(
        Completion(_ids(ids), None if not mask.is_valid else tuple(mask.as_py()))
        for ids, mask in pairs
    )


def _has_masks(table: pa.Table) -> np.ndarray:
    """(rows,) Which rows have an answer of which not every token is scored."""
    kept = kept_positions(table)
    found = np.zeros(len(table), dtype=bool)
    if len(kept):
        masks = compute.is_valid(compute.list_flatten(table.column("scored"))).to_numpy()
        found[kept] = masks.reshape(len(kept), -1).any(axis=1)
    return found


def _ids(scalar: Any) -> tuple[int, ...]:
    return tuple(scalar.values.to_numpy().tolist())


def whole_lengths(table: pa.Table) -> np.ndarray:
    """(rows, 1 + answers) Tokens of prompts and answers before any cut; 0 for dropped rows."""
    prompts = compute.fill_null(compute.list_value_length(table.column("prompt_ids")), 0).to_numpy()
    kept = kept_positions(table)
    flat = compute.list_value_length(compute.list_flatten(table.column("completions"))).to_numpy()
    answers = flat.reshape(len(kept), -1) if len(kept) else flat.reshape(0, 2)
    lengths = np.zeros((len(table), 1 + answers.shape[1]), dtype=np.int64)
    lengths[:, 0] = prompts
    lengths[kept, 1:] = answers
    return lengths


def over_limits(lengths: np.ndarray, limits: Limits) -> np.ndarray:
    """(rows,) Which rows `truncate` would not leave as they are.

    Args:
        lengths: (rows, 1 + answers), as `whole_lengths` gives them.
        limits: to compare with.
    """
    over = np.zeros(len(lengths), dtype=bool)
    if limits.max_prompt_length is not None:
        over |= lengths[:, 0] > limits.max_prompt_length
    if limits.longest is not None:
        over |= lengths[:, 0] + lengths[:, 1:].max(axis=1) > limits.longest
    return over


def kept_positions(table: pa.Table) -> np.ndarray:
    """Positions of the rows that were not dropped."""
    return np.flatnonzero(compute.is_null(table.column("reason")).to_numpy())


def dropped_rows(table: pa.Table) -> list[Dropped]:
    """The rows that were dropped, in order."""
    dropped = table.filter(compute.is_valid(table.column("reason"))).select(
        ["row_id", "reason", "detail"]
    )
    return [
        Dropped(row["row_id"], DropReason(row["reason"]), row["detail"])
        for row in dropped.to_pylist()
    ]


def apply_limits(table: pa.Table, dataset: str, limits: Limits) -> tuple[np.ndarray, list[Dropped]]:
    """Which kept rows stay under the limits, and which are dropped by them.

    Args:
        table: of `SCHEMA`.
        dataset: its name.
        limits: of the run.

    Returns:
        Positions of the rows that stay, cut or whole, and the rows dropped, both in order.
    """
    kept = kept_positions(table)
    over = over_limits(whole_lengths(table)[kept], limits)
    stays = np.ones(len(kept), dtype=bool)
    dropped = []
    for index in np.flatnonzero(over):
        cut = truncate(read_row(table, int(kept[index]), dataset), limits)
        if isinstance(cut, Dropped):
            stays[index] = False
            dropped.append(cut)
    return kept[stays], dropped
