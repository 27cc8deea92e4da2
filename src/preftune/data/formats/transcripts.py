r"""`{chosen, rejected}` as text in the layout of Anthropic's HH: `\n\nHuman: …\n\nAssistant: …`."""

from preftune.data.formats.prompt_pair import common_prefix
from preftune.data.formats.row import Row
from preftune.data.reasons import Dropped, DropReason
from preftune.schema import Example

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_transcripts(row: Row) -> Example | Dropped:
    r"""Read a row of two transcripts; the prompt ends with the last `\n\nAssistant:` both share.

    Transcripts that share no such turn get an empty prompt, which `data.tokenize` drops.

    Raises:
        DataError: a column is missing or not text, or the text is not in HH's layout, so that
            nothing says where the prompt ends.
    """
    chosen, rejected = row.text("chosen"), row.text("rejected")
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)  # row_format sends messages elsewhere
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.startswith(HUMAN) or ASSISTANT not in text:
            raise row.error(
                f"{name!r} is text, there is no prompt, and the text is not in the layout "
                f"{HUMAN + ' …' + ASSISTANT + ' …'!r}, so the prompt's end is unknown (it begins "
                f"{text[:40]!r})",
                "add a 'prompt' column, or name it with --column_map",
            )
    if row.tools():
        raise row.error(
            "column 'tools' has tools, but the row is plain text and no chat template is applied",
            "write the conversations as messages, or remove the tools",
        )
    turns = [text.split(ASSISTANT) for text in (chosen, rejected)]
    # What comes after the last `Assistant:` is an answer on either side, even if both agree.
    shared = common_prefix(*(turn[:-1] for turn in turns))
    cut = len(ASSISTANT.join([*shared, ""])) if shared else 0
    answers = (chosen[cut:], rejected[cut:])
    if cut and any(HUMAN in answer for answer in answers):
        # The human's words would be trained on as the assistant's.
        return Dropped(row.row_id, DropReason.USER_TURN_IN_ANSWER)
    return row.example(chosen[:cut], answers, ("chosen", "rejected"))
