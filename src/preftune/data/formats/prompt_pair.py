"""`{prompt, chosen, rejected}`: a prompt and two answers, as text or as messages."""

from collections.abc import Mapping
from typing import Any

from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped, DropReason
from preftune.schema import Example, Message, Role, Text


def read_prompt_pair(row: Row) -> Example | Dropped:
    """Read a row of a prompt and two answers; see `read_with_prompt`.

    Raises:
        DataError: a column is missing or of the wrong type, or text stands beside messages.
    """
    return read_with_prompt(row, {"chosen": "chosen", "rejected": "rejected"})


def read_with_prompt(row: Row, answer_columns: Mapping[str, Role]) -> Example | Dropped:
    """Read a row that has a prompt column.

    A prompt and answers that are all text stay text; answers of text that all repeat the prompt
    would train on a doubled one. Where an answer is messages, a text prompt is the user's message
    and a text answer the assistant's. Answers that repeat the prompt's messages
    (ultrafeedback_binarized's layout) are taken without the repeat.

    Example:
        `{"prompt": "Hi", "chosen": [user "Hi", assistant "Hello"], "rejected": [...]}` gives the
        prompt `[user "Hi"]` and the answers `[assistant "Hello"]`, `[...]`.

    Args:
        row: the row.
        answer_columns: our names of the columns that hold its answers -> what the answers are.

    Raises:
        DataError: a column is missing or of the wrong type, or an answer is text where the prompt
            is messages, so that nothing says whether the answer holds a header.
    """
    prompt, texts = row.text("prompt"), {name: row.text(name) for name in answer_columns}
    tools, roles = row.tools(), tuple(answer_columns.values())
    plain = [text for text in texts.values() if isinstance(text, str)]
    if isinstance(prompt, str) and len(plain) == len(texts):
        if tools:
            raise row.error(
                "column 'tools' has tools, but the row is plain text and no chat template is "
                "applied to it",
                "write the prompt as messages, or remove the tools",
            )
        if prompt.strip() and all(_goes_on(text, prompt) for text in plain):
            return Dropped(row.row_id, DropReason.PROMPT_REPEATED)
        return row.example(prompt, tuple(plain), roles)
    if not isinstance(prompt, str) and plain:
        name = next(name for name, text in texts.items() if isinstance(text, str))
        raise row.error(
            f"'prompt' is messages and {name!r} is text",
            'write answers to messages as messages: [{"role": "assistant", "content": …}]',
        )
    answers = tuple(_as_messages(text, "assistant") for text in texts.values())
    messages = _prompt_messages(prompt, answers)
    without = tuple(_without_repeat(messages, answer) for answer in answers)
    return row.example(messages, without, roles, tools)


def common_prefix(first: list[Any], *others: list[Any]) -> list[Any]:
    """The messages that all lists begin with."""
    length = 0
    while length < len(first) and all(
        length < len(other) and first[length] == other[length] for other in others
    ):
        length += 1
    return first[:length]


def _goes_on(text: str, prompt: str) -> bool:
    return len(text) > len(prompt) and text.startswith(prompt)


def _as_messages(text: Text, role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _prompt_messages(prompt: Text, answers: tuple[list[Message], ...]) -> list[Message]:
    messages = _as_messages(prompt, "user")
    if isinstance(prompt, str):
        # Full conversations may open with a system message that the prompt column does not hold.
        shared = common_prefix(*answers)
        turns = [i for i, message in enumerate(shared) if message == messages[0]]
        if turns:
            return shared[: turns[-1] + 1]
    return messages


def _without_repeat(prompt: list[Message], answer: list[Message]) -> list[Message]:
    if prompt and answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    return answer
