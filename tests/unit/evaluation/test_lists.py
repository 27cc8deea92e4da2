"""Pairs sorted into lists, worked out by hand, and what holds of any margins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from preftune.evaluation.lists import SUSPECTS, rewards_without_reference, sort_pairs
from preftune.evaluation.scores import PairScores

some_margins = st.tuples(st.integers(1, 4), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.floats(-1000, 1000))
)


def test_by_hand():
    """Of 20 pairs, 2 can be mislabelled: row 3, and row 7, on which the models disagree, not.

    σ(ln 9) = 0.9, σ(-ln 9) = 0.1, σ(ln 3) = 0.75.
    """
    nine, three = np.log(9), np.log(3)
    margins = np.full((2, 20), three)
    margins[:, 3] = -nine
    margins[:, 7] = (-4 * nine, 0.1)
    margins[:, 5] = (-0.2, -0.1)
    margins[:, 11] = (2 * nine, nine + 1e-9)
    margins[:, 12] = nine + 1e-9
    margins[:, 13] = (3 * nine, nine - 0.1)  # not sure enough in one of them
    margins[:, 14] = 0.0
    found = sort_pairs(margins)
    assert found.rows["mislabelled"].tolist() == [3]
    assert found.rows["hard"].tolist() == [7, 5, 14]
    assert found.rows["learnt"].tolist() == [11, 12]
    assert found.counts == {"mislabelled": 1, "hard": 3, "learnt": 2}
    assert found.confidence[[0, 3, 14]] == pytest.approx([0.75, 0.1, 0.5])


@given(some_margins)
def test_what_holds_of_any_margins(margins):
    found = sort_pairs(margins)
    rows = [set(held.tolist()) for held in found.rows.values()]
    assert sum(map(len, rows)) == len(set().union(*rows))  # no pair is on two lists
    mislabelled, hard, learnt = found.rows.values()
    assert len(mislabelled) <= SUSPECTS * margins.shape[1] + 1
    assert (margins[:, mislabelled] < 0).all()
    # Every pair that the models rank wrong on the whole is on one of the first two lists.
    assert {*mislabelled, *hard} == set(np.flatnonzero(found.confidence <= 0.5))
    assert (np.diff(found.confidence[mislabelled]) >= 0).all()
    assert (np.diff(found.confidence[hard]) >= 0).all()
    assert (np.diff(found.confidence[learnt]) <= 0).all()


@given(some_margins, st.randoms())
def test_the_order_of_models_and_of_pairs_does_not_matter(margins, random):
    order = list(range(margins.shape[1]))
    random.shuffle(order)
    there, here = sort_pairs(margins), sort_pairs(margins[::-1, order])
    assert here.counts["learnt"] == there.counts["learnt"]
    assert here.confidence == pytest.approx(there.confidence[order])


def test_without_reference_the_mean_of_a_token_ranks():
    """A long chosen answer is the less likely one in sum, and the likelier one a token."""
    logps = PairScores(np.array([-20.0]), np.array([-10.0]))
    rewards = rewards_without_reference(logps, np.array([20]), np.array([5]))
    assert (rewards.chosen.item(), rewards.rejected.item()) == (-2.0, -4.0)
