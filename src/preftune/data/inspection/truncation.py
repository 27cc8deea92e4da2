"""What limits on length would cost, from lengths alone: `data.truncate` without the cutting."""

from dataclasses import dataclass

import numpy as np

from preftune.data.inspection.numbers import Answers
from preftune.data.table import over_limits
from preftune.data.truncate import Limits


@dataclass(frozen=True)
class TruncationCost:
    """What one set of limits does to rows that were read whole."""

    limits: Limits
    num_rows: int
    num_over: int
    """Rows over a limit: dropped or cut."""
    num_dropped: int
    answer_tokens: int
    answer_tokens_lost: int
    """With the rows dropped, and cut from the others."""
    prompt_tokens: int
    prompt_tokens_lost: int


def truncation_cost(answers: Answers, limits: Limits) -> TruncationCost:
    """Count what `truncate` would drop and cut.

    Args:
        answers: of rows that are not dropped, before any cut.
        limits: to try.
    """
    lengths = answers.lengths
    prompts, sides = lengths[:, 0], lengths[:, 1:]
    over = over_limits(lengths, limits)
    if limits.truncation == "drop":
        dropped, kept_prompts, kept_sides = over, prompts, sides
    else:
        reserve = sides.max(axis=1) if limits.truncation == "keep_end" else np.ones_like(prompts)
        kept_prompts = np.where(over, np.minimum(prompts, _room(limits, reserve)), prompts)
        left = _unlimited(prompts)
        if limits.max_length is not None:
            left = limits.max_length - kept_prompts
        kept_sides = np.where(over[:, None], np.minimum(sides, left[:, None]), sides)
        unscored = (answers.first_scored >= left[:, None]).any(axis=1)
        dropped = over & (unscored | (answers.first_difference >= left))
    stays = ~dropped
    return TruncationCost(
        limits=limits,
        num_rows=len(lengths),
        num_over=int(over.sum()),
        num_dropped=int(dropped.sum()),
        answer_tokens=int(sides.sum()),
        answer_tokens_lost=int(sides.sum() - kept_sides[stays].sum()),
        prompt_tokens=int(prompts.sum()),
        prompt_tokens_lost=int(prompts.sum() - kept_prompts[stays].sum()),
    )


def _room(limits: Limits, reserve: np.ndarray) -> np.ndarray:
    """(rows,) Most prompt tokens, at least 1, that leave `reserve` tokens."""
    room = _unlimited(reserve)
    if limits.max_length is not None:
        room = np.maximum(1, limits.max_length - reserve)
    return room if limits.max_prompt_length is None else np.minimum(room, limits.max_prompt_length)


def _unlimited(like: np.ndarray) -> np.ndarray:
    return np.full_like(like, np.iinfo(np.int64).max)
