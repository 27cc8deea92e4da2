"""Win rates of one model over another, from verdicts on pairs of answers; pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["first", "second", "tie"] | None
"""Which of two answers a judge prefers, in the order of reading; None: it did not say."""
Outcome: TypeAlias = Literal["win", "loss", "tie"] | None
"""What both orders together say of the trained model; None: not to be counted."""

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
_POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def outcome(trained_first: Verdict, trained_second: Verdict) -> Outcome:
    """What two verdicts on one pair of answers, in both orders, come to.

    A preference counts only where both orders agree; otherwise the pair is a tie. Without one of
    the verdicts it does not count.

    Args:
        trained_first: of the order in which the trained model's answer came first.
        trained_second: of the other one.
    """
    if trained_first is None or trained_second is None:
        return None
    if (trained_first, trained_second) == ("first", "second"):
        return "win"
    if (trained_first, trained_second) == ("second", "first"):
        return "loss"
    return "tie"


@dataclass(frozen=True)
class Rate:
    """A share of points with a 95 % interval."""

    num_pairs: int
    rate: float
    low: float
    high: float


def win_rate(outcomes: Sequence[Outcome]) -> Rate | None:
    """Wins and half of the ties, of the pairs that count; None where none does.

        p = (wins + ties / 2) / n
        (p + z²/2n ± z √(p (1 − p) / n + z²/4n²)) / (1 + z²/n),  z = 1.96

    That is the score interval of a proportion. A pair gives 0, 1/2 or 1 point, whose variance is at
    most p (1 − p) whatever the ties (Bhatia and Davis, 2000), so the interval errs towards too
    wide. It is about prompts like these; how far the judge itself is right is not in it.

    Args:
        outcomes: of each pair.

    Source:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    points = [_POINTS[one] for one in outcomes if one is not None]
    if not points:
        return None
    n, p = len(points), math.fsum(points) / len(points)
    z2 = Z95 * Z95
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and 1 the interval ends in the rate itself, but for rounding.
    return Rate(n, p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))
