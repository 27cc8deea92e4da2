"""`{messages}` and `{prompt, completion}`: what an assistant said, to be learnt as it stands."""

from preftune.data.formats.prompt_pair import read_with_prompt
from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped, DropReason
from preftune.schema import Example


def read_supervised(row: Row) -> Example | Dropped:
    """Read a row for supervised fine-tuning; one that has `messages` is a conversation.

    Of a conversation all of the assistant's turns are learnt: the prompt is what comes before the
    first of them, and the answer all the rest, whose other turns `data.tokenize` masks. Of a prompt
    and its completion, text or messages, the completion alone is learnt.

    Example:
        `{"messages": [user "Hi", assistant "Hello", user "2+2?", assistant "4"]}` gives the prompt
        `[user "Hi"]` and the answer of three messages.

    Raises:
        DataError: a column is missing or of the wrong type, text stands beside messages, or a label
            says that the completion is one to be avoided.
    """
    if not row.has("messages"):
        return _read_completion(row)
    messages = row.text("messages")
    if isinstance(messages, str):
        raise row.error(
            "column 'messages' is text",
            "write a list of messages with 'role' and 'content'; for plain text give a prompt and "
            "a completion",
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return Dropped(row.row_id, DropReason.NO_ASSISTANT_TURN)
    prompt, answer = messages[: turns[0]], messages[turns[0] :]
    return row.example(prompt, (answer,), ("answer",), row.tools())


def _read_completion(row: Row) -> Example | Dropped:
    if not row.has("completion"):
        remedy = "give messages, or prompt and completion, or say what your data calls them"
        chosen = "'prompt' and 'completion'" if row.has("prompt") else "'messages'"
        example = '{"completion": "chosen"}' if row.has("prompt") else '{"messages": "chosen"}'
        if row.has("chosen"):
            remedy = f"to learn the chosen answers, read them as {chosen}: --column_map '{example}'"
        raise row.error("it has neither 'messages' nor 'completion', which stage sft reads", remedy)
    if row.values.get("label") is False:
        raise row.error(
            "its label is false, so its completion is to be avoided, and stage sft learns every "
            "completion",
            "leave such rows out, or train on them with --stage dpo --loss_type kto",
        )
    return read_with_prompt(row, {"completion": "answer"})
