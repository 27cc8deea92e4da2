"""`{prompt, completion, label}`: one answer and whether it is a good one; and pairs taken apart."""

from dataclasses import replace

from preftune.data.formats.prompt_pair import read_with_prompt
from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped
from preftune.schema import Example


def read_unpaired(row: Row) -> Example | Dropped:
    """Read a row of a prompt, one answer, and a label: true for chosen, false for rejected.

    Text and messages are taken as they are of pairs; see `read_with_prompt`.

    Example:
        `{"prompt": "2+2? ", "completion": "4", "label": true}`

    Raises:
        DataError: a column is missing or of the wrong type, or text stands beside messages.
    """
    role = "chosen" if row.label() else "rejected"
    return read_with_prompt(row, {"completion": role})


def taken_apart(row: Example | Dropped) -> list[Example | Dropped]:
    """The two answers of a pair as rows of their own, with ids such as `train.jsonl:7 (chosen)`.

    Args:
        row: a pair, or one that is dropped: then each of its answers is.
    """
    ids = [f"{row.row_id} ({role})" for role in ("chosen", "rejected")]
    if isinstance(row, Dropped):
        return [replace(row, row_id=row_id) for row_id in ids]
    return [
        replace(row, row_id=row_id, completions=(answer,), roles=(role,))
        for row_id, answer, role in zip(ids, row.completions, row.roles, strict=True)
    ]
