"""SPPO against scalar arithmetic.

By hand, β = 0.1: (2 − 5)² + (−1 + 5)² = 25; β = 0.01: (2 − 50)² + (−1 + 50)² = 4705.
"""

import mpmath
import pytest

from preftune.losses.sppo_hard import SPPOHard
from tests.oracles import logratios


def formula(pair, beta):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        target = 1 / (2 * mpmath.mpf(beta))
        return (w - target) ** 2 + (r + target) ** 2

    return value


@pytest.mark.parametrize("beta", [0.001, 0.1, 2.5])
def test_value_and_gradient(pair, beta, check_formula):
    check_formula(SPPOHard(beta=beta), pair, formula(pair, beta))


@pytest.mark.parametrize(("knobs", "expected"), [({"beta": 0.1}, 25.0), ({}, 4705.0)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = SPPOHard(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.01 · 2 and 0.01 · −1."""
    result = SPPOHard()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.02)
    assert result.rejected_rewards.item() == pytest.approx(-0.01)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
