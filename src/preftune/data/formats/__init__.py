"""Raw rows -> `Example`. One small pure file a format; the format is decided row by row.

Adding one takes a file, a member of `RowFormat`, and a line in `row_format` and in `_read`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, assert_never

from preftune.data.formats.conversations import read_conversations
from preftune.data.formats.prompt_pair import read_prompt_pair
from preftune.data.formats.row import COLUMNS, Row, check_column_map
from preftune.data.formats.supervised import read_supervised
from preftune.data.formats.transcripts import read_transcripts
from preftune.data.formats.unpaired import read_unpaired, taken_apart
from preftune.data.reasons import Dropped
from preftune.schema import Example, RowKind

__all__ = ["COLUMNS", "RowFormat", "check_column_map", "parse_answers", "parse_row", "row_format"]


class RowFormat(StrEnum):
    """The layouts a row may have."""

    PROMPT_PAIR = "prompt_pair"
    CONVERSATIONS = "conversations"
    TRANSCRIPTS = "transcripts"
    UNPAIRED = "unpaired"
    SUPERVISED = "supervised"


def row_format(row: Row, *, kind: RowKind = "pairs") -> RowFormat:
    """Decide a row's format from the columns it has.

    Args:
        row: the row; where pairs or labelled answers are read, one that has `chosen` is a pair,
            whatever else it has.
        kind: what rows are read as.

    Raises:
        DataError: a mapped column is absent, `chosen` is missing or of the wrong type, or the row
            has one answer where pairs are read.
    """
    if kind == "supervised":
        return RowFormat.SUPERVISED
    if not row.has("chosen"):
        if kind == "labelled":
            return RowFormat.UNPAIRED
        if row.has("completion"):
            raise row.error(
                "it has one answer ('completion') and no 'chosen', and the loss reads pairs",
                "give rows of chosen and rejected answers, or train on such rows with "
                "--loss_type kto or bco, or with --stage sft",
            )
        if row.has("messages"):
            raise row.error(
                "it has 'messages' and no 'chosen', and the loss reads pairs",
                "give rows of chosen and rejected answers, or train on such rows with --stage sft",
            )
    if row.has("prompt"):
        return RowFormat.PROMPT_PAIR
    if isinstance(row.text("chosen"), str) and isinstance(row.text("rejected"), str):
        return RowFormat.TRANSCRIPTS
    return RowFormat.CONVERSATIONS


def parse_row(
    row_id: str,
    raw: Mapping[str, Any],
    *,
    dataset: str,
    column_map: Mapping[str, str],
    kind: RowKind = "pairs",
) -> Example | Dropped:
    """Turn a raw row into an `Example`, or say why it cannot be trained on.

    Args:
        row_id: where the row stands, for people.
        raw: the columns as read; never modified.
        dataset: the dataset's name, the default of `source`.
        column_map: our name -> the file's name.
        kind: what the row is read as; `parse_answers` reads labelled ones.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    row = Row(row_id=row_id, dataset=dataset, values=raw, column_map=column_map)
    return _read(row, row_format(row, kind=kind))


def parse_answers(
    row_id: str, raw: Mapping[str, Any], *, dataset: str, column_map: Mapping[str, str]
) -> list[Example | Dropped]:
    """`parse_row` with a row for each answer: a pair gives two, `{prompt, completion, label}` one.

    Args:
        row_id: where the row stands, for people.
        raw: the columns as read; never modified.
        dataset: the dataset's name, the default of `source`.
        column_map: our name -> the file's name.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    row = Row(row_id=row_id, dataset=dataset, values=raw, column_map=column_map)
    layout = row_format(row, kind="labelled")
    result = _read(row, layout)
    return [result] if layout is RowFormat.UNPAIRED else taken_apart(result)


def _read(row: Row, layout: RowFormat) -> Example | Dropped:
    match layout:
        case RowFormat.PROMPT_PAIR:
            return read_prompt_pair(row)
        case RowFormat.CONVERSATIONS:
            return read_conversations(row)
        case RowFormat.TRANSCRIPTS:
            return read_transcripts(row)
        case RowFormat.UNPAIRED:
            return read_unpaired(row)
        case RowFormat.SUPERVISED:
            return read_supervised(row)
        case _:
            assert_never(layout)
