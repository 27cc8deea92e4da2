"""`{chosen, rejected}` as messages: two full conversations that share their beginning."""

from preftune.data.formats.prompt_pair import common_prefix
from preftune.data.formats.row import Row
from preftune.schema import Example


def read_conversations(row: Row) -> Example:
    """Read a row of two conversations; the prompt is what both begin with.

    Conversations with nothing in common get an empty prompt, and one that is the beginning of the
    other an empty answer: `data.tokenize` drops and counts them under those names.

    Raises:
        DataError: a column is missing or of the wrong type.
    """
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        kinds = ["text" if isinstance(c, str) else "messages" for c in (chosen, rejected)]
        raise row.error(
            f"'chosen' is {kinds[0]} and 'rejected' is {kinds[1]}, and there is no prompt",
            "write both in one form, or add a 'prompt' column",
        )
    prompt = common_prefix(chosen, rejected)
    answers = (chosen[len(prompt) :], rejected[len(prompt) :])
    return row.example(prompt, answers, ("chosen", "rejected"), row.tools())
