"""Load a dataset of preference pairs: rows in, tokenised pairs and exact counts out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from preftune.data.formats import check_column_map, parse_row
from preftune.data.reasons import LENGTH_REASONS, MEANING, Dropped, DropReason
from preftune.data.sources import RawRow, open_source
from preftune.data.tokenize import PairTokenizer
from preftune.data.truncate import Limits, truncate
from preftune.errors import ConfigError, DataError
from preftune.schema import Example, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DROPPED_ROWS_KEPT = 1000
NOT_READ_YET = frozenset({"weight", "margin"})
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows read; `read == kept + sum(dropped.values())`."""

    read: int
    kept: int
    dropped: dict[str, int]
    """Reason -> rows, for reasons that occurred."""
    truncated: int
    """Rows that were cut and kept."""
    dropped_rows: tuple[tuple[str, str], ...]
    """(row id, reason) of the first `MAX_DROPPED_ROWS_KEPT` dropped rows."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for `run.json`."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "truncated": self.truncated,
            "dropped_rows": [list(row) for row in self.dropped_rows],
        }


@dataclass(frozen=True)
class PairDataset:
    """Tokenised pairs in the order of the data."""

    name: str
    examples: tuple[TokenizedExample, ...]
    counts: RowCounts
    fingerprint: str
    """xxh3_128, in hex, of the kept token ids, masks and order."""
    text_row_ids: frozenset[str] = field(default=frozenset(), repr=False)
    """Which rows are plain text, to which no chat template applies."""
    unread_columns: tuple[str, ...] = ()
    """Columns with a meaning to preftune that this version does not read."""
    truncated_row_ids: frozenset[str] = field(default=frozenset(), repr=False)
    """Which rows were cut, so that splits count them on the right side."""


def load_pairs(
    name: str,
    *,
    split: str = "train",
    column_map: Mapping[str, str] | None,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
    max_prompt_length: int | None,
    truncation: Literal["drop", "keep_start", "keep_end"],
    max_dropped_fraction: float,
    max_rows: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> PairDataset:
    """Read, check and tokenise a dataset of pairs.

    Args:
        name: a file (.jsonl, .json, .parquet, .csv), a folder of such files, or a Hub id.
        split: of a folder or Hub dataset.
        column_map: our name (prompt, chosen, rejected, tools, source) -> the data's name.
        tokenizer: from transformers, with its chat template set; not changed.
        max_length: most tokens of prompt and one answer together; None for no limit.
        max_prompt_length: most tokens of the prompt; None for no limit.
        truncation: what becomes of longer rows; see `data.truncate`.
        max_dropped_fraction: most of the rows, in 0..1, that may be dropped for other reasons.
        max_rows: read no more rows than this; None for all.
        progress: called now and then with (rows read, rows in all or None).

    Raises:
        DataError: the source or a row cannot be read, too many rows are untrainable, or none is
            left.
        ConfigError: a limit that leaves no room for a row.
    """
    limits = Limits(max_length, max_prompt_length, truncation)
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; set it to 1 or more, or leave it out")
    mapping = dict(column_map or {})
    check_column_map(mapping)
    source = open_source(name, split)
    total = source.total
    if max_rows is not None:
        total = None if total is None else min(total, max_rows)
    tally = _Tally()
    encode = PairTokenizer(tokenizer)
    rows = islice(source.rows(), max_rows)
    while chunk := list(islice(rows, _ROWS_AT_A_TIME)):
        tally.unread_columns.update(key for _, raw in chunk for key in NOT_READ_YET & raw.keys())
        for result in _tokenize_rows(chunk, name, mapping, encode, tally):
            tally.add(result, limits)
        if progress is not None:
            progress(tally.read, total)
    tally.check(f"{name} (split {split})", limits, max_dropped_fraction)
    return tally.dataset(name)


def fingerprint(examples: Iterable[TokenizedExample]) -> str:
    """xxh3_128, in hex, of token ids, masks and order; lengths keep neighbours apart."""
    digest = xxhash.xxh3_128()
    for example in examples:
        parts: list[int] = [len(example.prompt_ids), *example.prompt_ids, len(example.completions)]
        for completion in example.completions:
            parts += [len(completion.ids), *completion.ids]
            parts += [-1] if completion.scored is None else [int(s) for s in completion.scored]
        digest.update(np.asarray(parts, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _tokenize_rows(
    rows: list[RawRow],
    dataset: str,
    column_map: Mapping[str, str],
    encode: PairTokenizer,
    tally: "_Tally",
) -> Iterator[TokenizedExample | Dropped]:
    parsed = [
        parse_row(row_id, raw, dataset=dataset, column_map=column_map) for row_id, raw in rows
    ]
    examples = [row for row in parsed if isinstance(row, Example)]
    tally.text_rows.update(e.row_id for e in examples if isinstance(e.prompt, str))
    try:
        encoded = iter(encode(examples))
    except DataError as error:
        raise DataError(f"dataset {dataset}: {error}") from error
    for row in parsed:
        yield next(encoded) if isinstance(row, Example) else row


class _Tally:
    """Keeps what is trained on and counts the rest."""

    def __init__(self) -> None:
        self.read = 0
        self.kept: list[TokenizedExample] = []
        self.dropped: Counter[DropReason] = Counter()
        self.first: dict[DropReason, list[Dropped]] = {}
        self.dropped_rows: list[tuple[str, str]] = []
        self.truncated: list[str] = []
        self.text_rows: set[str] = set()
        self.unread_columns: set[str] = set()

    def add(self, result: TokenizedExample | Dropped, limits: Limits) -> None:
        self.read += 1
        row = result if isinstance(result, Dropped) else truncate(result, limits)
        if isinstance(row, Dropped):
            self.dropped[row.reason] += 1
            if len(self.dropped_rows) < MAX_DROPPED_ROWS_KEPT:
                self.dropped_rows.append((row.row_id, row.reason.value))
            examples = self.first.setdefault(row.reason, [])
            if len(examples) < 3:
                examples.append(row)
            return
        if row is not result:
            self.truncated.append(row.row_id)
        self.kept.append(row)

    def check(self, where: str, limits: Limits, max_dropped_fraction: float) -> None:
        """Refuse a dataset that lost too many rows, or all.

        Raises:
            DataError: naming the counts, the first rows of each reason, and the remedies.
        """
        if not self.read:
            raise DataError(f"{where}: holds no rows; choose another split or file")
        faulty = sum(n for reason, n in self.dropped.items() if reason not in LENGTH_REASONS)
        if faulty / self.read > max_dropped_fraction:
            raise DataError(
                f"{where}: {faulty} of {self.read} rows ({faulty / self.read:.1%}) cannot be "
                f"trained on, and max_dropped_fraction allows {max_dropped_fraction:g}.\n"
                f"{self._reasons()}\nClean these rows, or, if losing them is right, raise "
                f"max_dropped_fraction to {_at_least(faulty / self.read):g}."
            )
        if not self.kept:
            raise DataError(
                f"{where}: none of {self.read} rows can be trained on.\n{self._reasons()}\n"
                f"Clean the rows, or raise the limits (max_length is {limits.max_length}, "
                f"max_prompt_length {limits.max_prompt_length}, truncation {limits.truncation})."
            )

    def _reasons(self) -> str:
        lines = []
        for reason, number in self.dropped.most_common():
            first = self.first[reason]
            ids = ", ".join(row.row_id for row in first) + (", …" if number > len(first) else "")
            seen = f" First: {first[0].detail}." if first[0].detail else ""
            rows = "row" if number == 1 else "rows"
            lines.append(f"- {reason.value}: {number} {rows} ({ids}): {MEANING[reason]}.{seen}")
        return "\n".join(lines)

    def dataset(self, name: str) -> PairDataset:
        counts = RowCounts(
            read=self.read,
            kept=len(self.kept),
            dropped={reason.value: n for reason, n in sorted(self.dropped.items())},
            truncated=len(self.truncated),
            dropped_rows=tuple(self.dropped_rows),
        )
        examples = tuple(self.kept)
        return PairDataset(
            name=name,
            examples=examples,
            counts=counts,
            fingerprint=fingerprint(examples),
            text_row_ids=frozenset(e.row_id for e in examples) & self.text_rows,
            unread_columns=tuple(sorted(self.unread_columns)),
            truncated_row_ids=frozenset(self.truncated),
        )


def _at_least(fraction: float) -> float:
    """Round up to two digits, so that the value named in an error is one that works."""
    return min(1.0, np.ceil(fraction * 100) / 100)
