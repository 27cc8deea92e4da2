"""`{prompt, chosen, rejected}`: a prompt and two answers, as text or as messages."""

from typing import Any

from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped, DropReason
from preftune.schema import Example, Message, Text


def read_prompt_pair(row: Row) -> Example | Dropped:
    """Read a row that has a prompt column.

    A prompt and answers that are all text stay text; answers of text that both repeat the prompt
    would train on a doubled one. Where an answer is messages, a text prompt is the user's message
    and a text answer the assistant's. Answers that repeat the prompt's messages
    (ultrafeedback_binarized's layout) are taken without the repeat.

    Example:
        `{"prompt": "Hi", "chosen": [user "Hi", assistant "Hello"], "rejected": [...]}` gives the
        prompt `[user "Hi"]` and the answers `[assistant "Hello"]`, `[...]`.

    Raises:
        DataError: a column is missing or of the wrong type, or an answer is text where the prompt
            is messages, so that nothing says whether the answer holds a header.
    """
    prompt, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
    tools = row.tools()
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if tools:
            raise row.error(
                "column 'tools' has tools, but the row is plain text and no chat template is "
                "applied to it",
                "write the prompt as messages, or remove the tools",
            )
        if prompt.strip() and all(_goes_on(text, prompt) for text in (chosen, rejected)):
            return Dropped(row.row_id, DropReason.PROMPT_REPEATED)
        return Example(
            row_id=row.row_id,
            prompt=prompt,
            completions=(chosen, rejected),
            roles=("chosen", "rejected"),
            source=row.source(),
        )
    if not isinstance(prompt, str) and (isinstance(chosen, str) or isinstance(rejected, str)):
        name = "chosen" if isinstance(chosen, str) else "rejected"
        raise row.error(
            f"'prompt' is messages and {name!r} is text",
            'write answers to messages as messages: [{"role": "assistant", "content": …}]',
        )
    answers = (_as_messages(chosen, "assistant"), _as_messages(rejected, "assistant"))
    messages = _prompt_messages(prompt, answers)
    return Example(
        row_id=row.row_id,
        prompt=messages,
        completions=tuple(_without_repeat(messages, answer) for answer in answers),
        roles=("chosen", "rejected"),
        source=row.source(),
        tools=tools,
    )


def common_prefix(a: list[Any], b: list[Any]) -> list[Any]:
    """The messages that both lists begin with."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]


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
