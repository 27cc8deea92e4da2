"""Tokenised rows as Arrow columns: in memory, or mapped from disk whatever the size of the data."""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash

from preftune.batching.micro_batches import RowSizes
from preftune.data.reasons import Dropped, DropReason
from preftune.data.truncate import Limits, truncate
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
        "roles": result.roles,
        "prompt_ids": result.prompt_ids,
        "completions": [c.ids for c in completions],
        "scored": [c.scored for c in completions],
    }


def content_key(example: TokenizedExample) -> int:
    """64-bit hash of token ids and masks; lengths keep neighbours apart."""
    parts: list[int] = [len(example.prompt_ids), *example.prompt_ids, len(example.completions)]
    for completion in example.completions:
        parts += [len(completion.ids), *completion.ids]
        parts += [-1] if completion.scored is None else [int(s) for s in completion.scored]
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

    def take(self, rows: np.ndarray) -> "TokenRows":
        """The rows at `rows`, which may repeat, in that order."""
        taken = copy(self)
        for cached in ("lengths", "is_cut", "sizes"):
            taken.__dict__.pop(cached, None)
        taken._positions, taken._origins = self._positions[rows], self._origins[rows]
        return taken

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
        cut = truncate(self.whole(index), self._limits)
        assert not isinstance(cut, Dropped), "rows that the limits drop are not picked"
        return cut

    def whole(self, index: int) -> TokenizedExample:
        """One row before any cut."""
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
    def prompt_keys(self) -> np.ndarray:
        """(rows,) uint64; rows that share a prompt share it."""
        return self._column("prompt_key")

    @property
    def content_keys(self) -> np.ndarray:
        """(rows,) uint64 hash of ids and masks before any cut."""
        return self._column("content_key")

    @property
    def is_text(self) -> np.ndarray:
        """(rows,) Which rows are plain text."""
        return self._column("is_text").astype(bool)

    @property
    def highest_id(self) -> int:
        """The largest token id."""
        return int(self._column("highest_id").max())

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows, 1 + answers) Tokens of the prompt and of each answer, after any cut."""
        lengths = whole_lengths(self._table)[self._positions]
        for row in np.flatnonzero(over_limits(lengths, self._limits)):
            example = self[int(row)]
            lengths[row] = [len(example.prompt_ids), *(len(c.ids) for c in example.completions)]
        return lengths

    @cached_property
    def is_cut(self) -> np.ndarray:
        """(rows,) Which rows are cut to their limits."""
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
        """xxh3_128, in hex, of content, cuts and order."""
        digest = xxhash.xxh3_128(self.content_keys.tobytes())
        if self.is_cut.any():
            digest.update(self._limits.truncation.encode() + self.lengths.tobytes())
        return digest.hexdigest()

    def _column(self, name: str) -> np.ndarray:
        column = self._table.column(name)
        fill = False if column.type == pa.bool_() else 0
        return compute.fill_null(column, fill).to_numpy()[self._positions]


def read_row(table: pa.Table, position: int, dataset: str) -> TokenizedExample:
    """One kept row of a table.

    Args:
        table: of `SCHEMA`.
        position: of the row; it must not be a dropped one.
        dataset: its name.
    """

    def value(name: str) -> Any:
        return table.column(name)[position]

    completions = [
        Completion(_ids(ids), None if not mask.is_valid else tuple(mask.as_py()))
        for ids, mask in zip(value("completions"), value("scored"), strict=True)
    ]
    return TokenizedExample(
        row_id=value("row_id").as_py(),
        prompt_ids=_ids(value("prompt_ids")),
        completions=tuple(completions),
        roles=tuple(value("roles").as_py()),
        source=value("source").as_py() or dataset,
        prompt_key=value("prompt_key").as_py(),
    )


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
