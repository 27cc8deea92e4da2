"""Verdicts on curves made by hand: each where it belongs, and none on a healthy run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.report.runs import Curve, MetricName
from preftune.report.verdict import CHECKS, Evidence, judge
from tests.reports import healthy_lines

MARGINS = [0.05 * i for i in range(20)]


def evidence(number=100, stopped_itself=False, batch_size=8, **curves):
    """Evidence of curves at steps 10, 20, ...; __ in a name stands for /."""
    return Evidence(
        {
            name.replace("__", "/"): Curve([10 * (i + 1) for i in range(len(values))], values)
            for name, values in curves.items()
        },
        {"": number},
        batch_size,
        stopped_itself,
    )


def found(of):
    """Verdicts by name."""
    return {verdict.name: verdict for verdict in judge(of).verdicts}


def healthy():
    """Evidence of a run in which nothing is wrong."""
    curves = {}
    for line in healthy_lines():
        for name, value in line.items():
            if name != "step":
                curve = curves.setdefault(name, Curve())
                curve.steps.append(line["step"])
                curve.values.append(value)
    return Evidence(curves, {"": 100}, 8)


def test_a_healthy_run_is_learning_and_all_else_is_looked_for_and_not_found():
    judgement = judge(healthy())
    assert [(v.name, v.severity) for v in judgement.verdicts] == [("learning", "good")]
    assert "80% of the 100 held-out pairs" in judgement.verdicts[0].text
    assert judgement.clear == list(CHECKS)
    assert judgement.unjudged == []


def test_without_held_out_pairs_what_cannot_be_said_is_named():
    whole = healthy()
    curves = {name: c for name, c in whole.curves.items() if not name.startswith("eval/")}
    judgement = judge(Evidence(curves, {}, 8))
    (verdict,) = judgement.verdicts
    assert verdict.title == "Learning, on its training pairs"
    assert "test_size" in verdict.text
    assert [one.title for one in judgement.unjudged] == ["length gaming", "overfitting"]


@pytest.mark.parametrize(("number", "name"), [(100, "unclear"), (1000, "learning")])
def test_held_out_accuracy_within_chance_is_not_learning(number, name):
    curves = {"loss": [0.7, 0.6], "logratios__chosen": [0, 0.1], "rewards__margins": [0, 0.1]}
    assert name in found(evidence(number, eval__rewards__accuracies=[0.55], **curves))


def test_without_a_reference_the_first_evaluation_is_compared_with_not_chance():
    still = found(evidence(loss=[0.7, 0.6], eval__rewards__accuracies=[0.7, 0.7]))
    assert "unclear" in still
    better = found(evidence(loss=[0.7, 0.6], eval__rewards__accuracies=[0.5, 0.7]))
    assert "learning" in better


def test_single_answers_are_compared_with_the_first_evaluation():
    """Where four of five are desirable, 80 % are right by chance."""
    curves = {"loss": [0.7, 0.6], "logratios__chosen": [0, 0.1], "rewards__margins": MARGINS}
    curves |= {"rewards__baseline": [0.0]}
    verdicts = found(evidence(eval__rewards__accuracies=[0.8, 0.8], **curves))
    assert "held-out rows are judged right, against 80%" in verdicts["unclear"].text
    training = found(evidence(rewards__accuracies=[0.8] * 20, **curves))
    assert training["learning"].title == "Learning, on its training rows"


def test_pairs_that_are_learnt_by_heart():
    verdict = found(
        evidence(
            loss=[0.69 - 0.03 * i for i in range(20)],
            rewards__margins=MARGINS,
            rewards__accuracies=[0.5] * 5 + [0.95] * 15,
            logratios__chosen=[0.1] * 20,
            eval__rewards__accuracies=[0.5, 0.52],
        )
    )["not_generalising"]
    assert verdict.severity == "warning"
    assert "rewards/accuracies" in verdict.metrics


def test_a_loss_that_stays_where_it_began():
    assert "not_learning" in found(evidence(loss=[0.6931] * 12))
    assert "not_learning" not in found(evidence(loss=[0.6931] * 6 + [0.68] * 10))


def test_supervised_runs_learn_by_their_held_out_loss():
    falling = found(evidence(loss=[2.0, 1.5], eval__loss=[1.9, 1.6]))
    assert falling["learning"].metrics == ("eval/loss",)
    assert "unclear" in found(evidence(loss=[2.0, 1.5], eval__loss=[1.6, 1.6]))


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([0.7] * 10 + [1.5] * 10, True),
        ([0.7] * 10 + [1.3] * 10, False),
        ([0.7] * 19 + [9.0], False),  # one bad line is noise
    ],
)
def test_a_loss_at_twice_its_start_has_diverged(losses, diverged):
    verdicts = found(evidence(loss=losses))
    assert ("diverged" in verdicts) is diverged
    if diverged:
        assert set(verdicts) == {"diverged"}


def test_a_run_that_stopped_itself_has_diverged():
    assert set(found(evidence(stopped_itself=True, loss=[0.7, 0.6]))) == {"diverged"}


@pytest.mark.parametrize(("last", "saturated"), [(0.006, True), (0.008, False)])
def test_a_run_with_nothing_more_to_learn(last, saturated):
    of = evidence(
        loss=[0.7] * 5 + [last] * 10,
        rewards__accuracies=[0.6] * 5 + [1.0] * 10,
        rewards__margins=[0.1] * 5 + [6.0] * 10,
        grad_norm=[4.0] * 5 + [0.01] * 10,
    )
    assert ("saturated" in found(of)) is saturated
    if saturated:
        text = found(of)["saturated"].text
        assert "since step 60" in text
        assert "gradient norm 0.01 after 4" in text


@pytest.mark.parametrize(
    ("chosen", "rejected", "severity"),
    [
        (0.1, -1.0, None),
        (-0.02, -1.0, None),  # 0.4 nats
        (-0.2, -1.0, "note"),
        (-0.6, -1.0, "warning"),  # more than half of the rejected ones' fall
        (-2.0, -9.0, "warning"),  # more than 20 nats
    ],
)
def test_chosen_answers_that_lose_probability(chosen, rejected, severity):
    of = evidence(
        loss=[0.6] * 20,
        rewards__margins=MARGINS,
        logratios__chosen=[chosen * i for i in range(20)],
        logratios__rejected=[rejected * i for i in range(20)],
    )
    verdict = found(of).get("likelihood_displacement")
    assert (verdict and verdict.severity) == severity


def test_chosen_answers_that_fall_with_the_margin_are_not_displaced():
    sides = {"logratios__chosen": [-0.6 * i for i in range(20)], "logratios__rejected": [0.0] * 20}
    verdicts = found(evidence(loss=[0.6] * 20, rewards__margins=MARGINS[::-1], **sides))
    assert "likelihood_displacement" not in verdicts


def test_displacement_without_a_reference_is_seen_in_evaluations():
    sides = {"eval__logps__chosen": [-80, -90], "eval__logps__rejected": [-85, -99]}
    verdict = found(evidence(loss=[0.6] * 20, rewards__margins=MARGINS, **sides))
    assert verdict["likelihood_displacement"].metrics[0] == "eval/logps/chosen"


@pytest.mark.parametrize(
    ("correlation", "matched", "number", "severity"),
    [
        (0.3, 0.78, 200, None),
        (0.6, 0.78, 200, "note"),
        (-0.6, 0.78, 200, "note"),
        (0.6, 0.5, 200, "warning"),
        (0.3, 0.5, 200, "note"),
        (0.3, 0.72, 2000, None),  # surely less, but little
        (0.3, 0.5, 30, None),  # 12 pairs of equal length say nothing
    ],
)
def test_rewards_that_follow_length(correlation, matched, number, severity):
    of = evidence(
        number,
        loss=[0.7, 0.6],
        eval__rewards__accuracies=[0.8],
        eval__rewards__accuracies_length_matched=[matched],
        eval__rewards__length_matched=[0.4],
        eval__rewards__length_correlation=[correlation],
    )
    verdict = found(of).get("length_gaming")
    assert (verdict and verdict.severity) == severity


@pytest.mark.parametrize(
    ("held_out", "training", "overfitted"),
    [
        ([0.6, 0.5, 0.52], [0.69 - 0.03 * i for i in range(20)], True),
        ([0.6, 0.5, 0.505], [0.69 - 0.03 * i for i in range(20)], False),  # 1 % above its least
        ([0.6, 0.5, 0.52], [0.5] * 20, False),  # the training loss does not fall
        ([0.6, 0.5, 0.4], [0.69 - 0.03 * i for i in range(20)], False),
    ],
)
def test_overfitting(held_out, training, overfitted):
    verdicts = found(evidence(loss=training, eval__loss=held_out))
    assert ("overfitting" in verdicts) is overfitted
    if overfitted:
        assert "least at step 20 (0.5)" in verdicts["overfitting"].text


def test_each_held_out_set_has_its_own_verdict():
    of = Evidence(
        {
            "loss": Curve([1, 2], [0.7, 0.6]),
            "logratios/chosen": Curve([1, 2], [0.0, 0.1]),
            "rewards/margins": Curve([1, 2], [0.0, 0.1]),
            "eval/good/rewards/accuracies": Curve([2], [0.9]),
            "eval/bad/rewards/accuracies": Curve([2], [0.5]),
            "eval/bad/source/x/rewards/accuracies": Curve([2], [0.9]),
        },
        {"good": 100, "bad": 100},
    )
    assert [v.name for v in judge(of).verdicts] == ["learning", "unclear"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("rewards/margins", ("rewards/margins", False, "", "")),
        ("eval/loss", ("loss", True, "", "")),
        ("eval/rewards/margins", ("rewards/margins", True, "", "")),
        ("eval/mine/loss", ("loss", True, "mine", "")),
        ("eval/mine/kl/forward", ("kl/forward", True, "mine", "")),
        ("eval/source/a/b/rewards/margins", ("rewards/margins", True, "", "a/b")),
        ("eval/mine/source/a/loss", ("loss", True, "mine", "a")),
    ],
)
def test_names_of_metrics_are_taken_apart(name, parts):
    assert MetricName.of(name) == MetricName(*parts)


NAMES = [
    "loss",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "logratios/chosen",
    "logratios/rejected",
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/length_correlation",
    "eval/rewards/length_matched",
    "eval/rewards/accuracies_length_matched",
    "eval/logps/chosen",
    "eval/logps/rejected",
]
VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=30)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES), st.integers(0, 1000))
def test_whatever_the_curves_every_check_ends_in_one_of_three_ways(values, number):
    of = Evidence({n: Curve(list(range(len(v))), v) for n, v in values.items()}, {"": number}, 8)
    judgement = judge(of)
    assert judgement == judge(of)
    assert len({v.name for v in judgement.verdicts}) == len(judgement.verdicts)
    for verdict in judgement.verdicts:
        assert "nan" not in verdict.text
        assert verdict.metrics
    progress = {"learning", "not_learning", "not_generalising", "unclear", "diverged"}
    assert len(progress & {v.name for v in judgement.verdicts}) == 1
