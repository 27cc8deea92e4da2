"""Why a well-formed row cannot be trained on: the closed list, and what each means."""

from dataclasses import dataclass
from enum import StrEnum


class DropReason(StrEnum):
    """Reasons for which rows are dropped and counted; the values appear in `run.json`."""

    EMPTY_PROMPT = "empty_prompt"
    EMPTY_COMPLETION = "empty_completion"
    EQUAL_COMPLETIONS = "equal_completions"
    NOT_A_PREFIX = "not_a_prefix"
    PROMPT_REPEATED = "prompt_repeated"
    LAST_NOT_ASSISTANT = "last_not_assistant"
    NO_ASSISTANT_TURN = "no_assistant_turn"
    STOP_TOKEN_INSIDE = "stop_token_inside"
    USER_TURN_IN_ANSWER = "user_turn_in_answer"
    TEMPLATE_REFUSED = "template_refused"
    UNEXPECTED_ENDING = "unexpected_ending"
    OVER_LENGTH = "over_length"
    PROMPT_OVER_LENGTH = "prompt_over_length"
    OVER_CONTEXT = "over_context"
    DROPPED_BY_TRANSFORM = "dropped_by_transform"
    PROMPT_HELD_OUT = "prompt_held_out"


ASKED_FOR = frozenset(
    {
        DropReason.OVER_LENGTH,
        DropReason.PROMPT_OVER_LENGTH,
        DropReason.DROPPED_BY_TRANSFORM,
        DropReason.PROMPT_HELD_OUT,
    }
)
"""What the configuration asks for: no fault of the data, so no part of `max_dropped_fraction`."""

MEANING: dict[DropReason, str] = {
    DropReason.EMPTY_PROMPT: "the prompt has no tokens, so nothing predicts the first answer token",
    DropReason.EMPTY_COMPLETION: "an answer holds nothing but blanks and its stop token",
    DropReason.EQUAL_COMPLETIONS: "chosen and rejected are the same tokens",
    DropReason.NOT_A_PREFIX: (
        "the prompt's tokens do not begin the sequence of prompt and answer: a text prompt that "
        "ends in a space, an answer that does not follow the prompt, or a chat template that "
        "writes the conversation differently once it is answered"
    ),
    DropReason.PROMPT_REPEATED: (
        "the answer, or each of a pair, begins with the whole text of the prompt, which would "
        "stand there twice: take it out of the answers"
    ),
    DropReason.LAST_NOT_ASSISTANT: "the last message of an answer is not the assistant's",
    DropReason.NO_ASSISTANT_TURN: "no message is the assistant's, so there is nothing to learn",
    DropReason.STOP_TOKEN_INSIDE: "an answer holds the stop token before its end",
    DropReason.USER_TURN_IN_ANSWER: "a text answer goes on with a turn of the human",
    DropReason.TEMPLATE_REFUSED: "the chat template raised an error on these messages",
    DropReason.UNEXPECTED_ENDING: "the chat template ended the answer unlike its other answers",
    DropReason.OVER_LENGTH: "prompt and answer together exceed max_length",
    DropReason.PROMPT_OVER_LENGTH: "the prompt exceeds max_prompt_length",
    DropReason.OVER_CONTEXT: (
        "prompt and answer together exceed the positions of the model, and max_length allows it: "
        "set max_length to the model's positions to drop or cut such rows on purpose"
    ),
    DropReason.DROPPED_BY_TRANSFORM: "a transform dropped the row on purpose",
    DropReason.PROMPT_HELD_OUT: "the prompt is in a dataset for evaluation",
}


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row left out, and why."""

    row_id: str
    reason: DropReason
    detail: str = ""
    """What was seen in this row, where the reason alone does not say it."""
