"""Outcomes of two orders, win rates and their intervals, against arithmetic by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluation.win_rate import outcome, win_rate

SWAPPED = {"win": "loss", "loss": "win", "tie": "tie", None: None}
VERDICTS = ["first", "second", "tie", None]
OUTCOMES = st.lists(st.sampled_from(list(SWAPPED)), max_size=200)


@pytest.mark.parametrize(
    ("trained_first", "trained_second", "expected"),
    [
        ("first", "second", "win"),
        ("second", "first", "loss"),
        ("first", "first", "tie"),  # whichever comes first
        ("second", "second", "tie"),
        ("tie", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "tie", "tie"),
        (None, "second", None),
        ("first", None, None),
    ],
)
def test_a_preference_counts_where_both_orders_agree(trained_first, trained_second, expected):
    assert outcome(trained_first, trained_second) == expected


@pytest.mark.parametrize("first", VERDICTS)
@pytest.mark.parametrize("second", VERDICTS)
def test_outcomes_mirror_when_the_models_change_places(first, second):
    """With the other model called the trained one, its answer comes first in the other order."""
    mirror = {"first": "second", "second": "first", "tie": "tie", None: None}
    assert outcome(second, first) == SWAPPED[outcome(first, second)]
    assert outcome(mirror[first], mirror[second]) == SWAPPED[outcome(first, second)]


def test_by_hand():
    """6 wins, 2 losses, 2 ties of 10: 0.7, and Wilson's interval of 7 in 10 (0.3968, 0.8922)."""
    rate = win_rate(["win"] * 6 + ["loss"] * 2 + ["tie"] * 2 + [None] * 5)
    assert rate.num_pairs == 10
    assert rate.rate == pytest.approx(0.7)
    # z² = 3.8415; middle (0.7 + 0.192073) / 1.384146 = 0.644493;
    # half 1.959964 √(0.021 + 0.009604) / 1.384146 = 0.247715
    assert (rate.low, rate.high) == (
        pytest.approx(0.396778, abs=1e-5),
        pytest.approx(0.892208, abs=1e-5),
    )


def test_nothing_counts():
    assert win_rate([]) is None
    assert win_rate([None, None]) is None


@pytest.mark.parametrize("outcomes", [["win"] * 4, ["loss"] * 4])
def test_unanimous(outcomes):
    """4 of 4: from 4 / (4 + z²) = 0.5101 to 1."""
    rate = win_rate(outcomes)
    far = 4 / (4 + 1.959963984540054**2)
    assert {round(rate.low, 9), round(rate.high, 9)} == (
        {round(far, 9), 1.0} if rate.rate else {round(1 - far, 9), 0.0}
    )


@given(OUTCOMES)
def test_the_interval_holds_the_rate_and_mirrors(outcomes):
    rate = win_rate(outcomes)
    mirrored = win_rate([SWAPPED[one] for one in outcomes])
    if rate is None:
        assert mirrored is None
        return
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1
    assert mirrored.rate == pytest.approx(1 - rate.rate, abs=1e-12)
    assert mirrored.low == pytest.approx(1 - rate.high, abs=1e-12)
    assert mirrored.high == pytest.approx(1 - rate.low, abs=1e-12)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(2, 5))
def test_more_of_the_same_narrows_the_interval(wins, losses, ties, times):
    outcomes = ["win"] * wins + ["loss"] * losses + ["tie"] * ties
    if outcomes:
        few, many = win_rate(outcomes), win_rate(outcomes * times)
        assert many.high - many.low < few.high - few.low
        assert math.isclose(many.rate, few.rate)
