"""A summary of scores as text of at most 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.evaluation.scores import PairsSummary, Ranking, Rewards, ScoreSummary

_MOST_SOURCES = 20
"""Most sources that are printed; the JSON has all."""
_MOST_LISTED = 5
"""Most pairs of a list that are printed."""
_TITLES = {"mislabelled": "likely mislabelled", "hard": "too hard", "learnt": "already learnt"}
_LABEL, _SOURCE, _MODEL = 24, 17, 14
"""Widest names, of models alone, and of sources and models side by side."""


def summary_text(summary: ScoreSummary) -> str:
    """The tables that the command prints.

    Args:
        summary: of all models.
    """
    total = summary.total
    parts = [_about_pairs(total), *_model_tables(summary), *_source_tables(summary)]
    return "\n\n".join(parts)


def lists_text(counts: Mapping[str, int], listed: Sequence[Mapping[str, Any]]) -> str:
    """How many pairs each list has, and the first of each.

    Args:
        counts: pairs by list.
        listed: rows of the lists' file.
    """
    lines = ["probability that a label is right, row, and how its chosen answer begins"]
    for name, number in counts.items():
        rows = [row for row in listed if row["list"] == name]
        more = f", the first {len(rows)} in the file" if len(rows) < number else ""
        lines.append(f"{_TITLES[name]}: {number} pairs{more}")
        for row in rows[:_MOST_LISTED]:
            start = f"  {row['confidence']:.3f}  {_cut(row['row_id'], _LABEL)}  "
            lines.append(start + " ".join(row["chosen"].split())[: 80 - len(start)])
    return "\n".join(lines)


def _about_pairs(total: PairsSummary) -> str:
    share = total.num_length_matched / total.num_pairs
    return (
        f"{total.num_pairs} pairs; {total.num_length_matched} of them ({share:.0%}) are "
        "length-matched: their answers'\nlengths differ by at most a tenth. likelier: share of "
        "pairs whose chosen answer\nhas the higher log-prob; matched: the same over "
        "length-matched pairs."
    )


def _model_tables(summary: ScoreSummary) -> list[str]:
    total = summary.total
    header = ["log-probs (mean)", "chosen", "rejected", "likelier", "matched"]
    rows = [
        [_cut(label, _LABEL), f"{held.chosen:.4f}", f"{held.rejected:.4f}", *_shares(held)]
        for label, held in total.logps.items()
        if label in summary.models
    ]
    tables = [_table(header, rows, num_labels=1)]
    for reference in summary.references:
        against = [held for held in total.rewards if held.reference == reference]
        if against:
            tables.append(_rewards_table(summary, reference, against))
    return tables


def _rewards_table(summary: ScoreSummary, reference: str, against: Sequence[Rewards]) -> str:
    title = f"implicit rewards against {_cut(reference, 40)}, beta {summary.beta:g}"
    has_kl = any(held.kl is not None for held in against)
    header = ["", "accuracy", "matched", "margin", *(["KL, nats an answer"] if has_kl else [])]
    rows = []
    for held in against:
        row = [_cut(held.model, _LABEL), *_shares(held.rewards), f"{held.rewards.margin:.4f}"]
        if has_kl:
            row.append("-" if held.kl is None else f"{held.kl:.4f} ± {held.kl_error:.4f}")
        rows.append(row)
    return f"{title}\n{_table(header, rows, num_labels=1)}"


def _source_tables(summary: ScoreSummary) -> list[str]:
    if not summary.sources:
        return []
    tables = []
    references = [*dict.fromkeys(held.reference for held in summary.total.rewards)] or [None]
    for reference in references:
        title = (
            "by source"
            if reference is None
            else f"by source, rewards against {_cut(reference, 40)}"
        )
        header = ["", "", "pairs", "likelier"]
        header += ["matched"] if reference is None else ["accuracy", "matched", "margin"]
        rows = [
            row
            for source in summary.sources[:_MOST_SOURCES]
            for row in _source_rows(source, summary, reference)
        ]
        text = f"{title}\n{_table(header, rows, num_labels=2)}"
        if len(summary.sources) > _MOST_SOURCES:
            text += f"\n... and {len(summary.sources) - _MOST_SOURCES} smaller sources"
        tables.append(text)
    return tables


def _source_rows(
    source: PairsSummary, summary: ScoreSummary, reference: str | None
) -> list[list[str]]:
    rewards = {held.model: held.rewards for held in source.rewards if held.reference == reference}
    rows = []
    for label, logps in source.logps.items():
        if label not in (summary.models if reference is None else rewards):
            continue
        row = [_cut(str(source.source), _SOURCE), _cut(label, _MODEL), str(source.num_pairs)]
        if reference is None:
            row += _shares(logps)
        else:
            held = rewards[label]
            row += [f"{logps.accuracy:.4f}", *_shares(held), f"{held.margin:.4f}"]
        rows.append(row)
    return rows


def _shares(ranking: Ranking) -> list[str]:
    matched = ranking.accuracy_length_matched
    return [f"{ranking.accuracy:.4f}", "-" if matched is None else f"{matched:.4f}"]


def _table(header: list[str], rows: list[list[str]], *, num_labels: int) -> str:
    """Columns side by side, labels to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        placed = [
            cell.ljust(width) if index < num_labels else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(placed).rstrip()

    return "\n".join(map(line, [header, *rows]))


def _cut(text: str, width: int) -> str:
    """The end of a name that is too long: paths differ there."""
    return text if len(text) <= width else "…" + text[1 - width :]
