"""What the curves of a run say, in plain words; pure functions.

Each check looks at the curves that can tell, and says what it saw with the numbers and the limit.
It says so, too, where a run has not logged what it needs.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from preftune.report.runs import Curve, MetricName, unit_of
from preftune.report.thresholds import ACCURATE, DISPLACED, FALL_RATIO, HALF, LEFT, QUIET, STILL

FELL = -1.0
"""Nats of the mean chosen log-ratio from where on it is told; batches differ by less."""
SURE = 2.0
"""Standard errors from where on a difference is not put down to chance (95 %)."""
RISEN = 0.02
"""Relative rise of the held-out loss above its least: the generalisation loss of Prechelt, "Early
Stopping - But When?" (1998), at 2 %."""
CORRELATED = 0.5
"""Correlation of reward and length from where on length says a quarter (r²) of the reward."""
LOST, FEWEST = 0.1, 20
"""Accuracy that is lost among answers of equal length, and how many such pairs it takes."""
DIVERGED = 2.0
"""Times its start at which a run's last loss has diverged."""

Severity = Literal["good", "note", "warning"]


@dataclass(frozen=True)
class Verdict:
    """One thing that the curves say."""

    name: str
    title: str
    severity: Severity
    text: str
    metrics: tuple[str, ...]
    """Full names of those that say so, the most telling first."""


@dataclass(frozen=True)
class Unjudged:
    """Something that could not be looked for."""

    title: str
    why: str


@dataclass(frozen=True)
class Evidence:
    """What the checks look at."""

    curves: Mapping[str, Curve]
    """By full name."""
    num_held_out: Mapping[str, int] = field(default_factory=dict)
    """Rows of each held-out set, by label; empty for a single one."""
    batch_size: int = 1
    """Rows of one step."""
    stopped_itself: bool = False
    """Whether the run ended because a number was not finite."""

    @property
    def unit(self) -> str:
        """What a row is."""
        return unit_of(self.curves)

    def curve(self, name: str) -> Curve:
        """A metric without what is no number; empty where it was not logged."""
        return self.curves.get(name, Curve()).finite()

    def held_out(self, metric: str) -> Iterator[tuple[str, Curve]]:
        """A metric of each held-out set, by its label."""
        for full in self.curves:
            name = MetricName.of(full)
            if name.held_out and name.metric == metric and not name.source:
                yield name.label, self.curve(full)


@dataclass(frozen=True)
class Judgement:
    """What was found, what was looked for and not found, and what nothing can be said of."""

    verdicts: list[Verdict]
    clear: list[str]
    unjudged: list[Unjudged]


def judge(evidence: Evidence) -> Judgement:
    """Make all checks."""
    judgement = Judgement([*_progress(evidence)], [], [])
    for title, check in CHECKS.items():
        found = list(check(evidence))
        verdicts = [one for one in found if isinstance(one, Verdict)]
        judgement.verdicts.extend(verdicts)
        judgement.unjudged.extend(one for one in found if isinstance(one, Unjudged))
        if not found:
            judgement.clear.append(title)
    return judgement


# ---------------------------------------------------------------- what several checks need


@dataclass(frozen=True)
class _Change:
    """A curve's first lines against its last ones."""

    start: float
    end: float
    error: float
    """Standard error of the difference, by how far the lines differ among themselves."""

    @property
    def rises(self) -> bool:
        return self.end - self.start > SURE * self.error

    @property
    def falls(self) -> bool:
        return self.start - self.end > SURE * self.error


def _change(curve: Curve) -> _Change | None:
    """None for a single point."""
    number = min(HALF, len(curve) // 2)
    if number == 0:
        return None
    first, last = curve.values[:number], curve.values[-number:]
    error = 0.0
    if number > 1:
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / number)
    return _Change(statistics.fmean(first), statistics.fmean(last), error)


def _by_chance(number: int) -> float:
    """How far the accuracy on so many rows is from 1/2 by chance alone, at most."""
    return SURE * math.sqrt(0.25 / max(number, 1))


def _of(label: str) -> str:
    return f" of {label}" if label else ""


def _metric(label: str, metric: str) -> str:
    return f"eval/{label}/{metric}" if label else f"eval/{metric}"


Found = Iterator[Verdict | Unjudged]

# ---------------------------------------------------------------- is it learning?


def _progress(evidence: Evidence) -> Iterator[Verdict]:
    """One verdict on what has been learnt; nothing where the run diverged, which says it all."""
    if any(isinstance(found, Verdict) for found in _diverged(evidence)):
        return
    if still := _not_learning(evidence):
        yield still
        return
    held_out = list(_learning_held_out(evidence))
    if held_out:
        yield from held_out
        return
    yield _learning_in_training(evidence)


def _not_learning(evidence: Evidence) -> Verdict | None:
    loss = evidence.curve("loss")
    if len(loss) <= HALF or loss.values[0] == 0:
        return None
    start, last = loss.values[0], loss.values[-QUIET:]
    farthest = max(abs(value / start - 1) for value in last)
    if farthest >= STILL:
        return None
    text = (
        f"The loss is where it began: within {farthest:.1g} of {start:.4g} over the last "
        f"{len(last)} lines (below {STILL:g} counts as no change). Raise learning_rate."
    )
    return Verdict("not_learning", "Nothing learned", "warning", text, ("loss",))


def _learning_held_out(evidence: Evidence) -> Iterator[Verdict]:
    """What held-out accuracies say.

    Of pairs and a loss with a reference, against chance. Else against the first evaluation: without
    a reference the model has a say from the start, and single answers may be mostly of one kind.
    """
    for label, accuracy in evidence.held_out("rewards/accuracies"):
        number = evidence.num_held_out.get(label, 0)
        if not len(accuracy) or not number:
            continue
        by_chance = "logratios/chosen" in evidence.curves and evidence.unit == "pairs"
        if not by_chance and len(accuracy) < 2:
            continue
        before = 0.5 if by_chance else accuracy.values[0]
        than = "50%, which chance gives" if by_chance else f"{before:.0%} at the first one"
        last, least = accuracy.values[-1], before + _by_chance(number)
        names = (_metric(label, "rewards/accuracies"), _metric(label, "rewards/margins"))
        seen = (
            f"At the last evaluation {last:.0%} of the {number} held-out {evidence.unit}"
            f"{_of(label)} are judged right, against {than}"
        )
        if last > least:
            text = f"{seen}: what was learned holds beyond the training {evidence.unit}."
            yield Verdict("learning", "Learning", "good", text, names)
        elif _fits_training(evidence):
            text = (
                f"{seen}, and more than {least:.0%} would be needed to say that it is not chance; "
                f"in training accuracy is higher. What was learned does not carry over: more or "
                f"cleaner {evidence.unit} help, or fewer epochs."
            )
            names = (*names, "rewards/accuracies")
            yield Verdict("not_generalising", "Learning by heart", "warning", text, names)
        else:
            text = (
                f"{seen}, and more than {least:.0%} would be needed to say that it is not chance. "
                f"Train longer, raise learning_rate, or hold out more {evidence.unit}."
            )
            yield Verdict("unclear", "No clear progress yet", "note", text, names)


def _fits_training(evidence: Evidence) -> bool:
    """Whether the last training accuracies are above chance; it is known of pairs alone."""
    accuracy = evidence.curve("rewards/accuracies")
    last = accuracy.values[-HALF:]
    if len(accuracy) <= len(last) or evidence.unit != "pairs":
        return False
    num_steps = accuracy.steps[-1] - accuracy.steps[-len(last) - 1]
    return statistics.fmean(last) > 0.5 + _by_chance(evidence.batch_size * num_steps)


def _learning_in_training(evidence: Evidence) -> Verdict:
    """The same without held-out accuracies."""
    accuracy = evidence.curve("rewards/accuracies")
    held_out = [(label, c) for label, c in evidence.held_out("loss") if len(c) > 1]
    if not len(accuracy) and held_out:
        return _falling_held_out(*held_out[0])
    loss, margin = _change(evidence.curve("loss")), _change(evidence.curve("rewards/margins"))
    is_learning, seen = False, "there are too few lines of metrics to tell"
    if len(accuracy) and margin is not None:
        fits = evidence.unit != "pairs" or _fits_training(evidence)
        is_learning = fits and margin.rises
        seen = (
            f"margins went from {margin.start:.3g} to {margin.end:.3g}, with "
            f"{statistics.fmean(accuracy.values[-HALF:]):.0%} of the last {evidence.unit} judged "
            "right"
        )
    elif loss is not None:
        is_learning = loss.falls
        seen = f"the training loss went from {loss.start:.4g} to {loss.end:.4g}"
    text = (
        f"{_capital(seen)}. Whether it holds for other {evidence.unit} was not measured: set "
        "test_size or eval_dataset, and eval_strategy."
    )
    names = ("rewards/margins", "rewards/accuracies") if len(accuracy) else ("loss",)
    if is_learning:
        title = f"Learning, on its training {evidence.unit}"
        return Verdict("learning", title, "good", text, names)
    return Verdict("unclear", "No clear progress yet", "note", text, names)


def _falling_held_out(label: str, curve: Curve) -> Verdict:
    """What the held-out loss alone says."""
    first, last = curve.values[0], curve.values[-1]
    text = f"The held-out loss{_of(label)} went from {first:.4g} to {last:.4g}."
    names = (_metric(label, "loss"),)
    if last < first - STILL * abs(first):
        return Verdict("learning", "Learning", "good", text, names)
    return Verdict("unclear", "No clear progress yet", "note", text, names)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------- is anything wrong?


def _diverged(evidence: Evidence) -> Found:
    if evidence.stopped_itself:
        text = (
            "The run stopped itself, because a loss or gradient was no finite number. Lower "
            "learning_rate, set max_grad_norm, and look at the rows that it named."
        )
        yield Verdict("diverged", "Diverged", "warning", text, ("loss", "grad_norm"))
        return
    loss = _change(evidence.curve("loss"))
    if loss is None:
        yield Unjudged("divergence", "it takes two lines of metrics")
    elif loss.rises and loss.end - loss.start > (DIVERGED - 1) * abs(loss.start):
        text = (
            f"The training loss ends at {loss.end:.4g}, after {loss.start:.4g} at the start (from "
            f"{DIVERGED:g} times as much on it counts as diverged). Lower learning_rate."
        )
        yield Verdict("diverged", "Diverged", "warning", text, ("loss", "grad_norm"))


def _saturated(evidence: Evidence) -> Found:
    losses, accuracies = evidence.curve("loss"), evidence.curve("rewards/accuracies")
    if not len(accuracies) or len(losses) < QUIET or losses.values[0] <= 0:
        yield Unjudged("saturation", f"it takes {QUIET} lines of accuracy and of a loss above 0")
        return
    worst, start = max(losses.values[-QUIET:]), losses.values[0]
    if min(accuracies.values[-QUIET:]) < ACCURATE or worst > LEFT * start:
        return
    since = next(
        step for i, step in enumerate(losses.steps) if max(losses.values[i:]) <= LEFT * start
    )
    norms = _change(evidence.curve("grad_norm"))
    norm = f", and the gradient norm {norms.end:.2g} after {norms.start:.2g}" if norms else ""
    text = (
        f"There is nothing more to learn from these {evidence.unit}: since step {since} the loss "
        f"is at most {worst:.2g} of {start:.3g} at the start (the limit is {LEFT:g} of it), "
        f"accuracy is 1{norm}. Lower num_epochs."
    )
    names = ("rewards/accuracies", "loss", "grad_norm")
    yield Verdict("saturated", "Saturated", "warning", text, names)


def _displaced(evidence: Evidence) -> Found:
    """Whether chosen answers lose probability while margins grow.

    Source: Razin et al., "Unintentional Unalignment: Likelihood Displacement in Direct Preference
    Optimization", arXiv:2410.08847.
    """
    margin = _change(evidence.curve("rewards/margins"))
    chosen, rejected, names = _against_start(evidence)
    if margin is None or chosen is None or rejected is None:
        yield Unjudged(
            "likelihood displacement", "it takes log-ratios, or two evaluations of log-probs"
        )
        return
    if not (margin.end > margin.start and chosen.end - chosen.start <= FELL and chosen.falls):
        return
    fall, other = chosen.start - chosen.end, rejected.start - rejected.end
    is_bad = chosen.end - chosen.start < DISPLACED or fall >= FALL_RATIO * other
    displaced = evidence.curve("logratios/displaced")
    share = f" ({displaced.values[-1]:.0%} of them did at all)" if len(displaced) else ""
    seen = (
        f"Chosen answers became {fall:.3g} nats less likely on average{share}, rejected ones "
        f"{other:.3g}, while the margin grew to {margin.end:.3g}: probability goes to answers that "
        "are in neither side (arXiv:2410.08847)."
    )
    if is_bad:
        text = f"{seen} Set sft_weight above 0, or lower learning_rate."
        yield Verdict("likelihood_displacement", "Likelihood displacement", "warning", text, names)
    else:
        limit = f"{FALL_RATIO:g} of the rejected ones' fall, or {-DISPLACED:g} nats,"
        text = f"{seen} That is common; from {limit} on it is too much."
        title = "Some likelihood displacement"
        yield Verdict("likelihood_displacement", title, "note", text, names)


def _against_start(
    evidence: Evidence,
) -> tuple[_Change | None, _Change | None, tuple[str, ...]]:
    """How log-probs of chosen and rejected answers changed, and where that is seen."""
    names = ("logratios/chosen", "logratios/rejected")
    chosen, rejected = map(evidence.curve, names)
    if len(chosen) and len(rejected):
        # Against the reference, which is where the policy began.
        return _from_zero(chosen), _from_zero(rejected), names
    # Without a reference: of held-out answers, which are the same ones at each evaluation.
    for label, curve in evidence.held_out("logps/chosen"):
        names = (_metric(label, "logps/chosen"), _metric(label, "logps/rejected"))
        other = evidence.curve(names[1])
        if len(curve) > 1 and len(other) > 1:
            sides = [_Change(side.values[0], side.values[-1], 0.0) for side in (curve, other)]
            return sides[0], sides[1], names
    return None, None, ()


def _from_zero(curve: Curve) -> _Change | None:
    """A log-ratio's last lines against the start, where policy and reference are one."""
    last = curve.values[-min(HALF, max(1, len(curve) // 2)) :]
    error = statistics.stdev(last) / math.sqrt(len(last)) if len(last) > 1 else 0.0
    return _Change(0.0, statistics.fmean(last), error)


def _length_gaming(evidence: Evidence) -> Found:
    """Whether the reward is length.

    Source: Park et al., "Disentangling Length from Quality in Direct Preference Optimization",
    arXiv:2403.19159.
    """
    named = evidence.held_out("rewards/length_correlation")
    sets = [(label, curve) for label, curve in named if len(curve)]
    if not sets:
        yield Unjudged("length gaming", "it takes held-out pairs")
    for label, curve in sets:
        correlation, gap = curve.values[-1], _length_gap(evidence, label)
        correlated = abs(correlation) >= CORRELATED
        if not correlated and gap is None:
            continue
        if correlated:
            longer = "longer" if correlation > 0 else "shorter"
            seen = (
                f"The reward follows length: it correlates with the number of tokens by "
                f"{correlation:.2f} on held-out {evidence.unit}{_of(label)} (told from "
                f"{CORRELATED:g} on, either way), so {longer} answers get more."
            )
        else:
            seen = (
                f"Reward and length correlate little ({correlation:.2f}), but accuracy does not "
                f"hold without a difference in length{_of(label)}."
            )
        if gap is not None:
            seen += (
                f" Among answers of about equal length accuracy is {gap[1]:.0%}, not {gap[0]:.0%}."
            )
        text = (
            f"{seen} Look at the samples; ld_alpha below 1, simpo or dpo_norm weigh length less "
            "(arXiv:2403.19159)."
        )
        names = (
            _metric(label, "rewards/length_correlation"),
            _metric(label, "rewards/accuracies_length_matched"),
        )
        both = correlated and gap is not None
        title = "Length gaming" if both else "Signs of length gaming"
        severity: Severity = "warning" if both else "note"
        yield Verdict("length_gaming", title, severity, text, names)


def _length_gap(evidence: Evidence, label: str) -> tuple[float, float] | None:
    """Accuracy over all pairs and over those of equal length, where the latter is well below."""
    names = ("accuracies", "accuracies_length_matched", "length_matched")
    curves = [evidence.curve(_metric(label, f"rewards/{name}")) for name in names]
    if not all(map(len, curves)):
        return None
    plain, matched, share = (curve.values[-1] for curve in curves)
    number = share * evidence.num_held_out.get(label, 0)
    if number < FEWEST:
        return None
    error = math.sqrt(max(matched * (1 - matched), 0.0) / number)
    return (plain, matched) if plain - matched > max(LOST, SURE * error) else None


def _overfitting(evidence: Evidence) -> Found:
    sets = [(label, curve) for label, curve in evidence.held_out("loss") if len(curve) > 1]
    if not sets:
        yield Unjudged("overfitting", "it takes two evaluations of held-out rows")
    training = evidence.curve("loss")
    for label, curve in sets:
        least = min(curve.values)
        best, last = curve.steps[curve.values.index(least)], curve.values[-1]
        if least <= 0 or last <= (1 + RISEN) * least:
            continue
        then = [v for s, v in zip(training.steps, training.values, strict=True) if s <= best]
        now = training.values[-HALF:]
        before = statistics.fmean((then or training.values)[-HALF:]) if len(training) else math.nan
        if not (now and statistics.fmean(now) < before):
            continue
        text = (
            f"The held-out loss{_of(label)} was least at step {best} ({least:.4g}) and is "
            f"{last:.4g} now, {last / least - 1:.1%} above (from {RISEN:.0%} on it counts), while "
            f"the training loss went on from {before:.4g} to {statistics.fmean(now):.4g}. Train "
            "for fewer epochs, or keep the best checkpoint: metric_for_best_model eval/loss."
        )
        names = (_metric(label, "loss"), "loss")
        yield Verdict("overfitting", "Overfitting", "warning", text, names)


CHECKS: dict[str, Callable[[Evidence], Found]] = {
    "divergence": _diverged,
    "saturation": _saturated,
    "likelihood displacement": _displaced,
    "length gaming": _length_gaming,
    "overfitting": _overfitting,
}
"""What can be wrong, by its name in a sentence."""
