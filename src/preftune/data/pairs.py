"""Load preference pairs: sources in, tokenised pairs and exact counts out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from preftune.data.hub_cache import HubCache
from preftune.data.reasons import ASKED_FOR, MEANING, Dropped
from preftune.data.sources import Source, open_source
from preftune.data.table import (
    TokenizedRow,
    TokenRows,
    apply_limits,
    dropped_rows,
    kept_positions,
    make_table,
)
from preftune.data.tokenized import Progress, Recipe, Tokenized, tokenize_source
from preftune.data.transforms import RowTransforms, load_transforms
from preftune.data.truncate import Limits
from preftune.errors import ConfigError, DataError, Findings
from preftune.schema import RowKind, TokenizedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DROPPED_ROWS_KEPT = 1000


@dataclass(frozen=True)
class RowCounts:
    """What became of the rows read; `read == kept + sum(dropped.values()) + not_drawn`.

    Where pairs were taken apart, each of their answers is a row.
    """

    read: int
    kept: int
    dropped: dict[str, int]
    """Reason -> rows, for reasons that occurred."""
    truncated: int
    """Rows that were cut and kept."""
    dropped_rows: tuple[tuple[str, str], ...]
    """(row id, reason) of the first `MAX_DROPPED_ROWS_KEPT` dropped rows."""
    not_drawn: int = 0
    """Rows that could be trained on and that a mixer's amount left out."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for `run.json`."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "not_drawn": self.not_drawn,
            "truncated": self.truncated,
            "dropped_rows": [list(row) for row in self.dropped_rows],
        }


@dataclass(frozen=True)
class SourceCounts:
    """One source of a dataset."""

    name: str
    split: str
    revision: str | None
    """The commit, of a dataset of the Hub."""
    amount: int | float | None
    """What the mixer asks for; None for all."""
    counts: RowCounts
    num_drawn: int
    """Rows that it gives to the mix, repeats counted."""

    def as_dict(self) -> dict[str, Any]:
        """As plain values for `run.json`."""
        plain = {"name": self.name, "split": self.split, "revision": self.revision}
        plain |= {"amount": self.amount, "drawn": self.num_drawn}
        return plain | self.counts.as_dict()


@dataclass(frozen=True)
class PairDataset:
    """Tokenised pairs in the order of the data; they stay on disk until they are read."""

    name: str
    examples: TokenRows
    counts: RowCounts
    sources: tuple[SourceCounts, ...] = ()
    copies: np.ndarray | None = None
    """(rows,) How often each row shall stand in training; None: once. See `repeated`."""
    reused: bool = False
    """Whether all tokens came from the cache."""
    opened: tuple[Source, ...] = ()
    """The sources, which can be read again; empty for rows that were at hand."""

    @property
    def unit(self) -> str:
        """What its rows are: pairs, or rows of one answer each."""
        return "rows" if self.examples.num_answers == 1 else "pairs"

    @property
    def num_text_rows(self) -> int:
        """Rows of plain text, to which no chat template applies."""
        return int(self.examples.is_text.sum())

    @classmethod
    def of(cls, name: str, examples: Sequence[TokenizedExample]) -> "PairDataset":
        """A dataset of rows that are at hand."""
        table = make_table([TokenizedRow(example) for example in examples], name)
        rows = TokenRows([table], [name], [kept_positions(table)], Limits(None, None, "drop"))
        return cls(name, rows, RowCounts(len(rows), len(rows), {}, 0, ()))

    def take(self, rows: np.ndarray) -> "PairDataset":
        """The rows at `rows`, in that order; the counts stay those of the whole."""
        copies = None if self.copies is None else self.copies[rows]
        return replace(self, examples=self.examples.take(rows), copies=copies)

    def repeated(self) -> "PairDataset":
        """Every row as often as `copies` asks, copies side by side."""
        if self.copies is None:
            return self
        rows = np.repeat(np.arange(len(self.examples)), self.copies)
        return replace(self, examples=self.examples.take(rows), copies=None)


def load_pairs(
    sources: str | Sequence[tuple[str, int | float | None]],
    *,
    split: str = "train",
    tokenizer: "PreTrainedTokenizerBase",
    column_map: Mapping[str, str] | None = None,
    transforms: Sequence[str] = (),
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Literal["drop", "keep_start", "keep_end"] = "drop",
    context: int | None = None,
    max_dropped_fraction: float = 0.01,
    max_rows: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    hub: HubCache | None = None,
    num_proc: int = 1,
    progress: Progress | None = None,
    kind: RowKind = "pairs",
) -> PairDataset:
    """Read, check and tokenise pairs from one source or a mix of several.

    Args:
        sources: a file (.jsonl, .json, .parquet, .csv), a folder of such files or a Hub id; or
            several with the amount of each: a part of its usable rows (float; above 1 repeats
            rows), a number of rows (int), or None for all.
        split: of folders and Hub datasets.
        tokenizer: from transformers, with its chat template set; not changed.
        column_map: our name, of `data.formats.COLUMNS` -> the data's name.
        transforms: names of row functions, applied in order; see `data.transforms`.
        max_length: most tokens of prompt and one answer together; None for no limit.
        max_prompt_length: most tokens of the prompt; None for no limit.
        truncation: what becomes of longer rows; see `data.truncate`.
        context: positions of the model, a bound like `max_length`; None for none.
        max_dropped_fraction: most rows of a source, in 0..1, that may be dropped for other reasons.
        max_rows: read no more rows of a source than this, pairs counted whole; None for all.
        seed: of which rows are drawn where a source gives a part of its rows.
        cache: folder of tokenised sources; None keeps nothing.
        hub: where else to look for tokenised sources, and to put what is made.
        num_proc: processes that tokenise.
        progress: called now and then with (rows done, rows in all or None).
        kind: what rows are read as. labelled: each answer is a row of its own, counted and drawn
            by itself, rows of {prompt, completion, label} as they are and pairs taken apart;
            supervised: rows of {messages} or {prompt, completion}.

    Raises:
        DataError: a source or a row cannot be read, too many rows are untrainable, or none is
            left; of a mix, what is wrong with each source.
        ConfigError: a limit that leaves no room for a row, or an unknown transform.
        CacheError: the cache cannot be written or read.
    """
    limits = Limits(max_length, max_prompt_length, truncation, context)
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; set it to 1 or more, or leave it out")
    wanted = [(sources, None)] if isinstance(sources, str) else list(sources)
    opened, row_functions = _open_all([name for name, _ in wanted], split, transforms)
    recipe = Recipe(tokenizer, dict(column_map or {}), row_functions, kind)
    totals = [source.total for source in opened]
    total = None if None in totals or max_rows is not None else sum(t or 0 for t in totals)
    parts: list[_Part] = []
    findings = Findings()
    num_done = 0
    for source, (_, amount) in zip(opened, wanted, strict=True):

        def report(num_rows: int, _: int | None, before: int = num_done) -> None:
            if progress is not None:
                progress(before + num_rows, total)

        with findings:
            tokenized = tokenize_source(
                source,
                recipe,
                cache=cache,
                hub=hub,
                max_rows=max_rows,
                num_proc=num_proc,
                progress=report,
            )
            num_done += tokenized.num_read
            parts.append(_usable(tokenized, limits, max_dropped_fraction, amount, seed))
    findings.raise_all()
    return _mixed(parts, limits)


def _open_all(
    names: Sequence[str], split: str, transforms: Sequence[str]
) -> tuple[list[Source], RowTransforms]:
    """Find what is named; all that is absent is told at once."""
    findings = Findings()
    found, opened = RowTransforms(()), []
    with findings:
        found = load_transforms(transforms)
    for name in names:
        with findings:
            opened.append(open_source(name, split))
    findings.raise_all()
    return opened, found


@dataclass(frozen=True)
class _Part:
    """The rows of one source that are in the mix."""

    tokenized: Tokenized
    positions: np.ndarray
    copies: np.ndarray
    counts: SourceCounts


def _usable(
    tokenized: Tokenized,
    limits: Limits,
    max_dropped_fraction: float,
    amount: int | float | None,
    seed: int,
) -> _Part:
    """Apply limits, count, and draw the rows of one source."""
    source, table = tokenized.source, tokenized.table
    kept, over = apply_limits(table, source.name, limits)
    tally = _Tally(len(table), len(kept), [*dropped_rows(table), *over])
    tally.check(f"{source.name} (split {source.split})", limits, max_dropped_fraction)
    copies = draw(len(kept), amount, seed=[seed, int(source.fingerprint[:8], 16)])
    drawn = np.flatnonzero(copies)
    rows = TokenRows([table], [source.name], [kept[drawn]], limits)
    counts = tally.counts(num_drawn=len(drawn), truncated=int(rows.is_cut.sum()))
    about = (source.name, source.split, source.revision, amount)
    return _Part(
        tokenized, kept[drawn], copies[drawn], SourceCounts(*about, counts, int(copies.sum()))
    )


def draw(num_rows: int, amount: int | float | None, seed: Sequence[int]) -> np.ndarray:
    """How often each row of a source stands in the mix.

    Which rows are left out, or repeated once more than others, is decided by the seed; a larger
    amount holds all rows of a smaller one.

    Args:
        num_rows: usable rows of the source, 1 or more.
        amount: a part of them (float), a number of rows (int), or None for each once.
        seed: of the choice.

    Returns:
        (rows,) int64 counts; their sum is the amount, and at least 1.
    """
    if amount is None:
        return np.ones(num_rows, dtype=np.int64)
    wanted = amount if isinstance(amount, int) else max(1, round(amount * num_rows))
    copies = np.full(num_rows, wanted // num_rows, dtype=np.int64)
    copies[np.random.default_rng(seed).permutation(num_rows)[: wanted % num_rows]] += 1
    return copies


def _mixed(parts: list[_Part], limits: Limits) -> PairDataset:
    names = [part.tokenized.source.name for part in parts]
    examples = TokenRows(
        [part.tokenized.table for part in parts], names, [part.positions for part in parts], limits
    )
    sources = tuple(part.counts for part in parts)
    copies = np.concatenate([part.copies for part in parts])
    return PairDataset(
        name=" + ".join(names),
        examples=examples,
        counts=_summed([source.counts for source in sources]),
        sources=sources,
        copies=None if (copies == 1).all() else copies,
        reused=all(part.tokenized.reused for part in parts),
        opened=tuple(part.tokenized.source for part in parts),
    )


def _summed(counts: Sequence[RowCounts]) -> RowCounts:
    dropped: Counter[str] = Counter()
    for part in counts:
        dropped.update(part.dropped)
    rows = [row for part in counts for row in part.dropped_rows]
    return RowCounts(
        read=sum(part.read for part in counts),
        kept=sum(part.kept for part in counts),
        dropped=dict(sorted(dropped.items())),
        truncated=sum(part.truncated for part in counts),
        dropped_rows=tuple(rows[:MAX_DROPPED_ROWS_KEPT]),
        not_drawn=sum(part.not_drawn for part in counts),
    )


class _Tally:
    """What became of the rows of one source."""

    def __init__(self, num_read: int, num_usable: int, dropped: Sequence[Dropped]) -> None:
        self.num_read = num_read
        self.num_usable = num_usable
        self.dropped = dropped
        self.numbers = Counter(row.reason for row in dropped)

    def check(self, where: str, limits: Limits, max_dropped_fraction: float) -> None:
        """Refuse a source that lost too many rows, or all.

        Raises:
            DataError: naming the counts, the first rows of each reason, and the remedies.
        """
        if not self.num_read:
            raise DataError(f"{where}: holds no rows; choose another split or file")
        faulty = sum(n for reason, n in self.numbers.items() if reason not in ASKED_FOR)
        if faulty / self.num_read > max_dropped_fraction:
            raise DataError(
                f"{where}: {faulty} of {self.num_read} rows ({faulty / self.num_read:.1%}) cannot "
                f"be trained on, and max_dropped_fraction allows {max_dropped_fraction:g}.\n"
                f"{self._reasons()}\nClean these rows, or, if losing them is right, raise "
                f"max_dropped_fraction to {_at_least(faulty / self.num_read):g}."
            )
        if not self.num_usable:
            raise DataError(
                f"{where}: none of {self.num_read} rows can be trained on.\n{self._reasons()}\n"
                f"Clean the rows, or raise the limits (max_length is {limits.max_length}, "
                f"max_prompt_length {limits.max_prompt_length}, truncation {limits.truncation})."
            )

    def _reasons(self) -> str:
        lines = []
        for reason, number in self.numbers.most_common():
            first = [row for row in self.dropped if row.reason is reason][:3]
            ids = ", ".join(row.row_id for row in first) + (", …" if number > len(first) else "")
            seen = f" First: {first[0].detail}." if first[0].detail else ""
            rows = "row" if number == 1 else "rows"
            lines.append(f"- {reason.value}: {number} {rows} ({ids}): {MEANING[reason]}.{seen}")
        return "\n".join(lines)

    def counts(self, *, num_drawn: int, truncated: int) -> RowCounts:
        first = self.dropped[:MAX_DROPPED_ROWS_KEPT]
        return RowCounts(
            read=self.num_read,
            kept=num_drawn,
            dropped={reason.value: n for reason, n in sorted(self.numbers.items())},
            truncated=truncated,
            dropped_rows=tuple((row.row_id, row.reason.value) for row in first),
            not_drawn=self.num_usable - num_drawn,
        )


def _at_least(fraction: float) -> float:
    """Round up to two digits, so that the value named in an error is one that works."""
    return min(1.0, np.ceil(fraction * 100) / 100)
