"""The report as text: colours on a terminal, marks elsewhere."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text

from preftune.data.inspection.report import DatasetReport, Report, Table
from preftune.data.inspection.shown import Mark, Piece, ShownRow, ShownSide, visible

NUM_DROPPED = 20
FIRST_TOKENS, LAST_TOKENS = 250, 100
"""Of longer prompts and answers, only so many are shown in a terminal."""
_STYLES = {
    Mark.TRAINED: ("black on green", "black on cyan"),
    Mark.CONTEXT: ("dim", "dim"),
    Mark.CUT: ("red strike", "red strike"),
}
_INDENT = "    "


def report_text(report: Report, *, colours: bool) -> Text:
    """The whole report.

    Args:
        report: what was found out.
        colours: whether they show; where they do not, trained tokens stand in ⟦ ⟧, apart by ¦, and
            those cut off in ✂⟨ ⟩.
    """
    text = Text()
    width = max(len(name) for name, _ in report.facts)
    for name, value in report.facts:
        text.append(f"{name:{width}}  {visible(value)}\n")
    legend = "on colour" if colours else "⟦in¦brackets⟧"
    text.append(f"{'trained':{width}}  tokens {legend}; the model only reads the others\n")
    for dataset in report.datasets:
        text.append_text(_dataset_text(dataset, report.is_whole, colours))
    if report.overlap is not None:
        text.append_text(_table_text(report.overlap))
    for warning in report.warnings:
        text.append("\nwarning: ", style="bold red")
        text.append(f"{visible(warning)}\n")
    return text


def _dataset_text(dataset: DatasetReport, is_whole: bool, colours: bool) -> Text:
    title = f"{dataset.title}: {dataset.name} ({dataset.num_rows:,} {dataset.unit})"
    text = Text()
    text.append(f"\n{visible(title)}\n", style="bold")
    text.append("═" * len(title) + "\n")
    for row in dataset.shown:
        text.append_text(_row_text(row, dataset.name, is_whole, colours))
    for table in dataset.tables:
        text.append_text(_table_text(table))
    if dataset.dropped:
        first = dataset.dropped[:NUM_DROPPED]
        for row in first:
            detail = f": {row.detail}" if row.detail else ""
            text.append(visible(f"  {row.row_id}  {row.reason}{detail}") + "\n")
        if more := len(dataset.dropped) - len(first):
            text.append(f"  and {more:,} more (--dropped FILE.jsonl writes all)\n")
    return text


def _row_text(row: ShownRow, dataset_name: str, is_whole: bool, colours: bool) -> Text:
    text = Text()
    text.append(f"\n{visible(row.row_id)}", style="bold")
    text.append(f"  {visible(row.source)}\n" if row.source != dataset_name else "\n")
    if row.note:
        text.append(f"  {visible(row.note)}\n")
    for side in row.sides:
        text.append(f"  {side.summary}\n", style="italic")
        body = Text(_INDENT)
        for some, skipped in _abridged(side, is_whole):
            body.append_text(_coloured(some) if colours else _marked(some))
            if skipped:
                body.append(f" ⋯ {skipped:,} tokens ⋯ ")
        lines = body.split("\n", allow_blank=False)
        text.append_text(Text(f"\n{_INDENT}").join(lines))
        text.append("\n")
    return text


def _abridged(side: ShownSide, is_whole: bool) -> list[tuple[Sequence[Piece], int]]:
    """Pieces to show, and how many tokens are skipped behind them."""
    pieces = side.pieces
    if is_whole or len(pieces) <= FIRST_TOKENS + LAST_TOKENS:
        return [(pieces, 0)]
    skipped = sum(len(piece.ids) for piece in pieces[FIRST_TOKENS:-LAST_TOKENS])
    return [(pieces[:FIRST_TOKENS], skipped), (pieces[-LAST_TOKENS:], 0)]


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for index, piece in enumerate(pieces):
        text.append(visible(piece.text), style=_STYLES[piece.mark][index % 2])
    return text


def _marked(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for mark, run in groupby(pieces, lambda piece: piece.mark):
        texts = [visible(piece.text) for piece in run]
        match mark:
            case Mark.TRAINED:
                text.append(f"⟦{'¦'.join(texts)}⟧")
            case Mark.CUT:
                text.append(f"✂⟨{''.join(texts)}⟩")
            case Mark.CONTEXT:
                text.append("".join(texts))
    return text


def _table_text(table: Table) -> Text:
    text = Text()
    text.append(f"\n{table.title}\n", style="bold")
    cells = [tuple(map(visible, row)) for row in (table.columns, *table.rows)]
    if not any(cells[0]):
        del cells[0]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [is_numeric(column) for column in zip(*table.rows, strict=True)]
    for row in cells:
        text.append("  " + "  ".join(_aligned(row, widths, right)).rstrip() + "\n")
    if table.note:
        text.append(f"  {visible(table.note)}\n", style="dim")
    return text


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterator[str]:
    for cell, width, is_right in zip(row, widths, right, strict=True):
        yield f"{cell:>{width}}" if is_right else f"{cell:{width}}"


def is_numeric(column: Sequence[str]) -> bool:
    """Whether the cells of a column are numbers, to be aligned at their ends."""
    return all(cell and set(cell) <= set("0123456789,.%<>+-* ") for cell in column)
