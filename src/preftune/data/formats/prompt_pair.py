"""`{prompt, chosen, rejected}`: a prompt and two answers, as text or as messages."""

from typing import Any

from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped, DropReason
from preftune.schema import Example, Message, Text


def read_prompt_pair(row: Row) -> Example | Dropped:
    """Read a row that has a prompt column.

    A prompt and answers that are all text stay text. Where the answers are messages, a text prompt
    is the user's message. Answers that repeat the prompt's messages (ultrafeedback_binarized's
    layout) are taken without the repeat; what repeats it otherwise would train on a doubled prompt.

    Example:
        `{"prompt": "Hi", "chosen": [user "Hi", assistant "Hello"], "rejected": [...]}` gives the
        prompt `[user "Hi"]` and the answers `[assistant "Hello"]`, `[...]`.

    Raises:
        DataError: a column is missing or of the wrong type, or an answer is text where other
            columns are messages, so that nothing says whether it holds a header.
    """
    prompt, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
    tools = row.tools()
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if prompt.strip() and all(text.startswith(prompt) for text in (chosen, rejected)):
            return Dropped(row.row_id, DropReason.PROMPT_REPEATED)
        if tools:
            raise row.error(
                "column 'tools' has tools, but the row is plain text and no chat template is "
                "applied to it",
                "write the prompt as messages, or remove the tools",
            )
        return Example(
            row_id=row.row_id,
            prompt=prompt,
            completions=(chosen, rejected),
            roles=("chosen", "rejected"),
            source=row.source(),
        )
    if isinstance(chosen, str) or isinstance(rejected, str):
        kinds = ["text" if isinstance(x, str) else "messages" for x in (prompt, chosen, rejected)]
        raise row.error(
            f"'prompt' is {kinds[0]}, 'chosen' {kinds[1]} and 'rejected' {kinds[2]}",
            'write answers to messages as messages, too: [{"role": "assistant", "content": …}]',
        )
    messages = _prompt_messages(prompt, (chosen, rejected))
    answers = tuple(_without_repeat(messages, answer) for answer in (chosen, rejected))
    if any(_repeats(messages, answer) for answer in answers):
        return Dropped(row.row_id, DropReason.PROMPT_REPEATED)
    return Example(
        row_id=row.row_id,
        prompt=messages,
        completions=answers,
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


def _prompt_messages(prompt: Text, answers: tuple[list[Message], ...]) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
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


def _repeats(prompt: list[Message], answer: list[Message]) -> bool:
    """Whether an answer to the user begins with the user, or with a system message, once more."""
    asked = bool(prompt) and prompt[-1]["role"] == "user"
    # A single message is no repeat: the last one is not the assistant's, which is told elsewhere.
    return asked and len(answer) > 1 and answer[0]["role"] in ("user", "system")
