r"""The transforms preftune brings: pure functions from raw row to raw row.

Each leaves rows that it is not about as they are, and builds new values instead of changing those
it was given. Columns have preftune's names.
"""

import re
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

from preftune.data.formats.transcripts import ASSISTANT, HUMAN
from preftune.schema import Message

RawColumns: TypeAlias = dict[str, Any]
Transform: TypeAlias = Callable[[RawColumns], RawColumns]

_ANSWERS = ("chosen", "rejected", "completion")
_ROLES = {HUMAN: "user", ASSISTANT: "assistant"}


def text_to_messages(row: RawColumns) -> RawColumns:
    """Write a text prompt as the user's message and text answers as the assistant's.

    Rows of which not all are text are left alone: the reader knows what they mean.
    """
    names = _answers(row)
    if not all(isinstance(row.get(name), str) for name in ("prompt", *names)):
        return row
    return {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{name: [{"role": "assistant", "content": row[name]}] for name in names},
    }


def transcripts_to_messages(row: RawColumns) -> RawColumns:
    r"""Write texts of the layout `\n\nHuman: …\n\nAssistant: …` (HH) as messages.

    Either the answers hold the whole conversation and there is no prompt, or the prompt is the
    conversation up to a last `\n\nAssistant:`. Blanks around each turn are removed.
    """
    prompt = row.get("prompt")
    answers: dict[str, Any] = {name: row.get(name) for name in _answers(row)}
    if not all(isinstance(answer, str) for answer in answers.values()):
        return row
    if prompt is None:
        if all(_is_transcript(answer) for answer in answers.values()):
            return {**row, **{name: _turns(answer) for name, answer in answers.items()}}
        return row
    if not _is_transcript(prompt) or not prompt.rstrip().endswith(ASSISTANT):
        return row
    return {
        **row,
        "prompt": _turns(prompt)[:-1],
        **{
            name: _turns(answer if _is_transcript(answer) else ASSISTANT + answer)
            for name, answer in answers.items()
        },
    }


def swap_sides(row: RawColumns) -> RawColumns:
    """Exchange chosen and rejected, for data whose preference is the other way round.

    The label of a row with one answer is turned round.
    """
    if row.get("chosen") is None and isinstance(row.get("label"), bool | int):
        return {**row, "label": not row["label"]}
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def drop_system(row: RawColumns) -> RawColumns:
    """Remove system messages from prompt and answers."""
    return row | {
        name: [message for message in row[name] if _role(message) != "system"]
        for name in ("messages", "prompt", *_ANSWERS)
        if isinstance(row.get(name), list)
    }


def strip_answers(row: RawColumns) -> RawColumns:
    """Remove blanks around the last assistant message, and after an answer that is text.

    Blanks before a text answer stay: nothing else parts it from its prompt.
    """
    return row | {name: _stripped(row[name]) for name in _ANSWERS if name in row}


BUILTIN_TRANSFORMS: dict[str, Transform] = {
    function.__name__: function
    for function in (
        text_to_messages,
        transcripts_to_messages,
        swap_sides,
        drop_system,
        strip_answers,
    )
}
"""Name -> function; the first line of each docstring says what it does."""


def _answers(row: RawColumns) -> tuple[str, ...]:
    """The columns that hold a row's answers."""
    alone = row.get("chosen") is None and row.get("completion") is not None
    return ("completion",) if alone else ("chosen", "rejected")


def _is_transcript(text: Any) -> TypeGuard[str]:
    return isinstance(text, str) and text.startswith(HUMAN) and ASSISTANT in text


def _turns(transcript: str) -> list[Message]:
    # The split gives: nothing, header, turn, header, turn, …
    parts = re.split(f"({HUMAN}|{ASSISTANT})", transcript)[1:]
    return [
        {"role": _ROLES[header], "content": turn.strip()}
        for header, turn in zip(parts[::2], parts[1::2], strict=True)
    ]


def _role(message: Any) -> Any:
    # What is no message is reported by the reader, which names its place.
    return message.get("role") if isinstance(message, dict) else None


def _stripped(answer: Any) -> Any:
    if isinstance(answer, str):
        return answer.rstrip()
    if not isinstance(answer, list) or not answer or _role(answer[-1]) != "assistant":
        return answer
    content = answer[-1].get("content")
    if not isinstance(content, str):
        return answer
    return [*answer[:-1], answer[-1] | {"content": content.strip()}]
