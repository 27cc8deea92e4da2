"""Means over pairs, worked out by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluation.score_tables import lists_text, summary_text
from preftune.evaluation.scores import (
    Comparison,
    PairScores,
    ScoreSummary,
    equally_long,
    summarise,
    summarise_sources,
    with_divergences,
)

lengths = st.integers(1, 10_000)


def of(chosen: list[float], rejected: list[float]) -> PairScores:
    return PairScores(np.array(chosen), np.array(rejected))


@given(lengths, lengths)
def test_equally_long_is_within_a_tenth_of_the_longer(a, b):
    expected = 10 * (max(a, b) - min(a, b)) <= max(a, b)
    assert equally_long(np.array([a]), np.array([b])).tolist() == [expected]
    assert equally_long(torch.tensor([b]), torch.tensor([a])).tolist() == [expected]


BASE = of([-10, -20, -30, -40], [-8, -21, -33, -40])
TUNED = of([-9, -20, -36, -40], [-9, -25, -33, -44])
MATCHED = np.array([True, False, True, False])


def summary(sources: tuple[str, ...] = ("a", "b", "b", "b")) -> ScoreSummary:
    pair = Comparison("tuned", "base")
    scores = {"base": BASE, "tuned": TUNED}
    rewards = {pair: TUNED.rewards_against(BASE, 0.5)}
    total = with_divergences(
        summarise(scores, rewards, MATCHED), {pair: np.array([1.0, 2.0, 3.0, 6.0])}
    )
    return ScoreSummary(
        models={"base": "b", "tuned": "runs/tuned"},
        references={"base": "b"},
        beta=0.5,
        total=total,
        sources=summarise_sources(scores, rewards, MATCHED, sources),
    )


def test_by_hand():
    """Rewards: chosen 0.5, 0, -3, 0; rejected -0.5, -2, 0, -2; margins 1, 2, -3, 2."""
    total = summary().total
    assert (total.num_pairs, total.num_length_matched) == (4, 2)
    base = total.logps["base"]
    assert (base.chosen, base.rejected, base.margin) == (-25.0, -25.5, 0.5)
    # A tie is not ranked right: of the four, the second and third are.
    assert (base.accuracy, base.accuracy_length_matched) == (0.5, 0.5)
    (against,) = total.rewards
    assert (against.rewards.accuracy, against.rewards.accuracy_length_matched) == (0.75, 0.5)
    assert against.rewards.margin == 0.5
    # Deviations from the mean of 3: -2, -1, 0, 3; their squares sum to 14.
    assert against.kl == 3.0
    assert against.kl_error == pytest.approx((14 / 3) ** 0.5 / 2)


def test_sources_come_largest_first_and_alone_not_at_all():
    big, small = summary().sources
    assert (big.source, big.num_pairs, big.num_length_matched) == ("b", 3, 1)
    assert big.rewards[0].rewards.margin == pytest.approx(1 / 3)
    assert big.rewards[0].rewards.accuracy_length_matched == 0.0
    assert (small.source, small.rewards[0].rewards.accuracy) == ("a", 1.0)
    assert summary(("a",) * 4).sources == ()


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=4))
def test_sources_add_up_to_the_whole(names):
    found = summary(tuple(names))
    if found.sources:
        total = found.total.rewards[0].rewards.margin * 4
        parts = [held.rewards[0].rewards.margin * held.num_pairs for held in found.sources]
        assert sum(parts) == pytest.approx(total)


def test_the_summary_is_plain_json():
    held = json.loads(json.dumps(asdict(summary())))
    assert held["total"]["rewards"][0]["rewards"]["accuracy"] == 0.75
    assert held["total"]["logps"]["base"]["accuracy_length_matched"] == 0.5
    assert [source["source"] for source in held["sources"]] == ["b", "a"]


def test_the_text_is_a_table_of_80_columns():
    said = summary_text(summary())
    assert max(map(len, said.splitlines())) <= 80
    assert said.splitlines()[4:] == [
        "log-probs (mean)    chosen  rejected  likelier  matched",
        "base              -25.0000  -25.5000    0.5000   0.5000",
        "tuned             -26.2500  -27.7500    0.5000   0.0000",
        "",
        "implicit rewards against base, beta 0.5",
        "       accuracy  matched  margin  KL, nats an answer",
        "tuned    0.7500   0.5000  0.5000     3.0000 ± 1.0801",
        "",
        "by source, rewards against base",
        "          pairs  likelier  accuracy  matched  margin",
        "b  tuned      3    0.6667    0.6667   0.0000  0.3333",
        "a  tuned      1    0.0000    1.0000   1.0000  1.0000",
    ]


def test_long_names_and_many_sources_stay_within_80_columns():
    names = [f"{'x' * 60}{index}" for index in range(30)]
    scores = {name: of([-1.0] * 30, [-2.0] * 30) for name in names[:3]}
    rewards = {
        Comparison(name, names[2]): held.rewards_against(held, 0.1)
        for name, held in list(scores.items())[:2]
    }
    matched = np.zeros(30, dtype=bool)
    found = ScoreSummary(
        models={name: name for name in names[:2]},
        references={names[2]: names[2]},
        beta=0.1,
        total=summarise(scores, rewards, matched),
        sources=summarise_sources(scores, rewards, matched, names),
    )
    said = summary_text(found).splitlines()
    assert max(map(len, said)) <= 80
    assert said[-1] == "... and 10 smaller sources"
    assert sum(line.endswith("1    1.0000    0.0000        -  0.0000") for line in said) == 40
    row = {"list": "hard", "row_id": "y" * 90, "chosen": "z z\n" * 90, "confidence": 0.25}
    listed = lists_text({"hard": 7, "learnt": 0}, [row] * 6).splitlines()
    assert max(map(len, listed)) == 80
    assert len(listed) == 1 + 1 + 5 + 1
    assert listed[1] == "too hard: 7 pairs, the first 6 in the file"
    assert listed[2].startswith("  0.250  …yyy")
    assert listed[-1] == "already learnt: 0 pairs"
