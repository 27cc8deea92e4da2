"""Cutting rows to `max_length` and `max_prompt_length`, the prompt the same way for both sides."""

from dataclasses import dataclass, replace
from typing import Literal, assert_never

from preftune.data.reasons import Dropped, DropReason
from preftune.errors import ConfigError
from preftune.schema import Completion, TokenizedExample


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a row may be, in tokens, and what becomes of longer ones."""

    max_length: int | None
    """Prompt and one completion together; None for no limit."""
    max_prompt_length: int | None
    """The prompt alone; None for no limit."""
    truncation: Literal["drop", "keep_start", "keep_end"]
    context: int | None = None
    """Positions of the model, which prompt and one completion together cannot exceed; None for a
    model without such a bound."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: a limit that leaves no room for a prompt and an answer token.
        """
        problems = []
        if self.max_length is not None and self.max_length < 2:
            problems.append(
                f"max_length is {self.max_length}: a row needs one prompt token and one answer "
                "token; set it to 2 or more, or leave it out"
            )
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            problems.append(
                f"max_prompt_length is {self.max_prompt_length}: a prompt needs one token; set it "
                "to 1 or more, or leave it out"
            )
        if self.truncation not in ("drop", "keep_start", "keep_end"):
            problems.append(
                f"truncation is {self.truncation!r}; choose drop, keep_start or keep_end"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def longest(self) -> int | None:
        """Most tokens of prompt and one completion together; None for no limit."""
        bounds = [bound for bound in (self.max_length, self.context) if bound is not None]
        return min(bounds, default=None)


def truncate(example: TokenizedExample, limits: Limits) -> TokenizedExample | Dropped:
    """Cut or drop a row that is over its limits.

    `keep_start` keeps the beginning: the prompt's first tokens, then as much of each answer as is
    left. `keep_end` keeps the prompt's last tokens, as many as let the longer answer stay whole, at
    least one, and only then cuts answers at their end. A cut answer gets no stop token.

    Returns:
        The same object where nothing is over; otherwise a row whose prompt and completions have at
        least one token each, or what it was dropped for.
    """
    max_prompt = limits.max_prompt_length
    prompt_over = max_prompt is not None and len(example.prompt_ids) > max_prompt
    over = limits.longest is not None and max(example.lengths) > limits.longest
    if not (prompt_over or over):
        return example
    match limits.truncation:
        case "drop":
            return _dropped(example, limits)
        case "keep_start":
            room = _room_for_prompt(limits, reserve=1)
            prompt = example.prompt_ids[:room]
        case "keep_end":
            longest = max(len(c.ids) for c in example.completions)
            room = _room_for_prompt(limits, reserve=longest)
            prompt = example.prompt_ids if room is None else example.prompt_ids[-room:]
        case _:
            assert_never(limits.truncation)
    left = None if limits.longest is None else limits.longest - len(prompt)
    completions = tuple(cut_completion(c, left) for c in example.completions)
    if not all(c.num_scored for c in completions):
        return Dropped(example.row_id, DropReason.OVER_LENGTH)
    if len(completions) > 1 and all(c.ids == completions[0].ids for c in completions):
        return Dropped(example.row_id, DropReason.EQUAL_COMPLETIONS, "after truncation")
    return replace(example, prompt_ids=prompt, completions=completions)


def _dropped(example: TokenizedExample, limits: Limits) -> Dropped:
    """What a row over its limits is dropped for: what was asked for goes before what must be."""
    length = max(example.lengths)
    if limits.max_prompt_length is not None and len(example.prompt_ids) > limits.max_prompt_length:
        return Dropped(example.row_id, DropReason.PROMPT_OVER_LENGTH)
    if limits.max_length is not None and length > limits.max_length:
        return Dropped(example.row_id, DropReason.OVER_LENGTH)
    seen = f"{length} tokens, and the model has {limits.context} positions"
    return Dropped(example.row_id, DropReason.OVER_CONTEXT, seen)


def _room_for_prompt(limits: Limits, *, reserve: int) -> int | None:
    """Most prompt tokens, at least 1, that leave `reserve` tokens; None for any number."""
    rooms = [] if limits.max_prompt_length is None else [limits.max_prompt_length]
    if limits.longest is not None:
        rooms.append(max(1, limits.longest - reserve))
    return min(rooms) if rooms else None


def cut_completion(completion: Completion, left: int | None) -> Completion:
    """An answer's first `left` tokens; all of them where there is no limit (None)."""
    if left is None or len(completion.ids) <= left:
        return completion
    scored = completion.scored
    return Completion(completion.ids[:left], None if scored is None else scored[:left])
