"""What a run has met so far: skipped batches, and warnings on metrics that mean trouble.

Everything is read off the lines of metrics, so it costs nothing between them, and it depends on
nothing else, so that a resumed run warns where the straight one does.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from preftune.report.thresholds import (
    ACCURATE,
    DISPLACED,
    FALL,
    FALL_RATIO,
    HALF,
    LEFT,
    LINES,
    QUIET,
    STILL,
)

SPIKE = 10.0
"""Times the median of earlier lines. Norms vary by 2 to 3 times from batch to batch."""
CERTAIN, UNCERTAIN = -1.0, -5.0
"""Mean log-prob of a whole chosen answer, nats: e^-1 is certainty; a run that begins above e^-5,
with answers of a token or two, has always been so."""

WATCHED = (
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "logratios/chosen",
    "logps/chosen",
)
Line = Mapping[str, float]


@dataclass(frozen=True)
class Warned:
    """One warning, as `run.json` holds it."""

    step: int
    kind: str
    value: float
    threshold: float
    text: str
    """What is seen, from where on it counts, and one setting to change."""


@dataclass(frozen=True)
class _Finding:
    value: float
    threshold: float
    text: str


class Guards:
    """Watches the lines of metrics; a checkpoint holds all of it."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.skipped_steps: list[int] = []
        """Steps, counted from 1, whose update was left out."""
        self.warnings: list[Warned] = []
        self._first: dict[str, float] = {}
        self._lines: list[dict[str, float]] = []
        self._quiet: dict[str, int] = {}
        """Kind of a warning that was given -> lines since it was last true."""

    def look(self, step: int, metrics: Line) -> list[Warned]:
        """Take the next line of metrics; returns the warnings that are new."""
        line = {name: metrics[name] for name in WATCHED if name in metrics}
        self._lines = [*self._lines, line][-LINES:]
        self._first = self._first or line
        found = []
        for kind, check in CHECKS.items():
            finding = check(self._first, self._lines)
            if finding is not None:
                if kind not in self._quiet:
                    found.append(Warned(step, kind, **asdict(finding)))
                self._quiet[kind] = 0
            elif kind in self._quiet:
                self._quiet[kind] += 1
                if self._quiet[kind] >= QUIET:
                    del self._quiet[kind]
        self.warnings += found
        return found

    def state(self) -> dict[str, Any]:
        """Everything, as JSON keeps it."""
        return {
            "skipped_steps": self.skipped_steps,
            "warnings": [asdict(warned) for warned in self.warnings],
            "first": self._first,
            "lines": self._lines,
            "quiet": self._quiet,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.skipped_steps = list(state["skipped_steps"])
        self.warnings = [Warned(**warned) for warned in state["warnings"]]
        self._first = dict(state["first"])
        self._lines = [dict(line) for line in state["lines"]]
        self._quiet = dict(state["quiet"])


def _series(lines: list[dict[str, float]], name: str, number: int) -> list[float]:
    """A metric over the last lines; empty if there are fewer, or one lacks it."""
    values = [line[name] for line in lines[-number:] if name in line]
    return values if len(values) == number else []


def _halves(lines: list[dict[str, float]], name: str) -> tuple[float, float] | None:
    """Means of a metric over two successive stretches, the later one last."""
    values = _series(lines, name, 2 * HALF)
    if not values:
        return None
    return statistics.fmean(values[:HALF]), statistics.fmean(values[HALF:])


def _spike(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    earlier = [line["grad_norm"] for line in lines[:-1] if "grad_norm" in line]
    if len(earlier) < LINES // 2 or "grad_norm" not in lines[-1]:
        return None
    norm, median = lines[-1]["grad_norm"], statistics.median(earlier)
    if not norm > SPIKE * median > 0:
        return None
    text = (
        f"the gradient norm is {norm:.3g}, {norm / median:.0f} times the median of the lines "
        f"before ({median:.3g}; the limit is {SPIKE:g} times). If it comes again, lower "
        "max_grad_norm"
    )
    return _Finding(norm, SPIKE * median, text)


def _both_falling(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    chosen, rejected = _halves(lines, "rewards/chosen"), _halves(lines, "rewards/rejected")
    if chosen is None or rejected is None:
        return None
    fall, other = chosen[0] - chosen[1], rejected[0] - rejected[1]
    if not (other >= FALL and fall >= max(FALL, FALL_RATIO * other)):
        return None
    text = (
        f"the rewards of both sides fall: over the last {2 * HALF} lines the chosen one by "
        f"{fall:.3g}, the rejected one by {other:.3g} (from {FALL_RATIO:g} of the rejected one's "
        "fall on, the policy leaves the chosen answers, too). Lower learning_rate"
    )
    return _Finding(fall, max(FALL, FALL_RATIO * other), text)


def _displaced(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    chosen, rejected = _halves(lines, "rewards/chosen"), _halves(lines, "rewards/rejected")
    ratio = _halves(lines, "logratios/chosen")
    if chosen is None or rejected is None or ratio is None:
        return None
    rising = chosen[1] - rejected[1] > chosen[0] - rejected[0]
    if not (rising and ratio[1] < DISPLACED and ratio[1] < ratio[0]):
        return None
    text = (
        f"the chosen answers lost {-ratio[1]:.3g} nats against the reference (the limit is "
        f"{-DISPLACED:g}), while margins rise: the probability goes to answers that are in neither "
        "side. Set sft_weight above 0"
    )
    return _Finding(ratio[1], DISPLACED, text)


def _saturated(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    accuracies = _series(lines, "rewards/accuracies", QUIET)
    losses = _series(lines, "loss", QUIET)
    start = first.get("loss", 0.0)
    if not accuracies or not losses or start <= 0:
        return None
    worst = max(losses)
    if not (min(accuracies) >= ACCURATE and worst <= LEFT * start):
        return None
    text = (
        f"there is nothing more to learn from these pairs: accuracy is 1 over the last {QUIET} "
        f"lines, and the loss at most {worst:.3g} of {start:.3g} at the start (the limit is "
        f"{LEFT:g} of it). Lower num_epochs"
    )
    return _Finding(worst, LEFT * start, text)


def _certain(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    logps = _series(lines, "logps/chosen", HALF)
    if not logps or not first.get("logps/chosen", 0.0) < UNCERTAIN:
        return None
    mean = statistics.fmean(logps)
    if not mean > CERTAIN:
        return None
    text = (
        f"the policy's entropy on the chosen answers is all but gone: their log-prob is {mean:.3g} "
        f"nats for a whole answer, after {first['logps/chosen']:.4g} at the start (the limit is "
        f"{CERTAIN:g}). Lower learning_rate"
    )
    return _Finding(mean, CERTAIN, text)


def _not_learning(first: Line, lines: list[dict[str, float]]) -> _Finding | None:
    losses, rates = _series(lines, "loss", QUIET), _series(lines, "learning_rate", QUIET)
    start = first.get("loss", 0.0)
    if len(lines) < LINES or not losses or not rates or min(rates) <= 0 or start == 0:
        return None
    farthest = max(abs(loss / start - 1) for loss in losses)
    if not farthest < STILL:
        return None
    text = (
        f"the loss is where it began: within {farthest:.1g} of {start:.6g} over the last {QUIET} "
        f"lines (the limit is {STILL:g} of it). Raise learning_rate"
    )
    return _Finding(farthest, STILL, text)


CHECKS: dict[str, Callable[[Line, list[dict[str, float]]], _Finding | None]] = {
    "grad_norm_spike": _spike,
    "rewards_falling": _both_falling,
    "chosen_displaced": _displaced,
    "saturated": _saturated,
    "entropy_gone": _certain,
    "not_learning": _not_learning,
}
