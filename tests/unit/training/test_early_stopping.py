"""When a run stops early, by hand."""

import math

import pytest

from preftune.training.early_stopping import EarlyStopping

NAN = math.nan


def stopped_at(values, *, greater=False, patience=1, threshold=0.0) -> int | None:
    """Which evaluation, counted from 1, ends the run."""
    stopping = EarlyStopping("m", greater, patience, threshold)
    for number, value in enumerate(values, 1):
        stopping.take({"m": value})
        if stopping.is_over:
            return number
    return None


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([3, 2, 1], {}, None),
        ([3, 2, 2], {}, 3),
        ([3, 2, 4, 1], {}, 3),
        ([3, 2, 4, 1, 1, 1], {"patience": 2}, 6),
        ([1, 2, 3, 3], {"greater": True}, 4),
        ([3, 2.5, 2.4], {"threshold": 0.5}, 2),
        # Small steps that add up are better in the end.
        ([3, 2.6, 2.3, 2.2], {"threshold": 0.5, "patience": 2}, None),
        ([NAN, 3, 2], {}, 1),
        ([NAN, 3, NAN, 2, NAN, NAN], {"patience": 2}, 6),
    ],
)
def test_by_hand(values, options, expected):
    assert stopped_at(values, **options) == expected


def test_it_goes_on_counting_after_a_resume_by_the_same_measure_only():
    before = EarlyStopping("m", False, 3, 0.0)
    for value in (2.0, 3.0):
        before.take({"m": value})
    after = EarlyStopping("m", False, 2, 0.0)
    after.restore(before.as_dict())
    assert (after.value, after.num_waited, after.is_over) == (2.0, 1, False)
    after.take({"m": 2.0})
    assert after.is_over
    for other in (EarlyStopping("n", False, 2, 0.0), EarlyStopping("m", True, 2, 0.0)):
        other.restore(before.as_dict())
        assert (other.value, other.num_waited) == (None, 0)
    other.restore(None)


def test_why_is_told():
    stopping = EarlyStopping("eval/loss", False, 1, 0.5)
    stopping.take({"eval/loss": NAN})
    assert stopping.describe() == "eval/loss was no number in the last evaluation"
    stopping = EarlyStopping("eval/loss", False, 2, 0.5)
    for value in (1.25, 1.0, 2.0):
        stopping.take({"eval/loss": value})
    assert stopping.describe() == (
        "eval/loss was not better than 1.25 by more than 0.5 in the last 2 evaluations"
    )
