"""APO-zero against scalar arithmetic.

By hand, βs = 0.2 and −0.1: σ(−0.2) + σ(−0.1) = 0.4501660027 + 0.4750208125.
"""

import pytest

from preftune.losses.apo_zero import APOZero
from tests.oracles import logratios, sigmoid


def formula(pair, beta):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return 1 - sigmoid(beta * w) + sigmoid(beta * r)

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
def test_value_and_gradient(pair, beta, check_formula):
    check_formula(APOZero(beta=beta), pair, formula(pair, beta))


@pytest.mark.parametrize(("knobs", "expected"), [({}, 0.4501660027 + 0.4750208125)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = APOZero(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · 2 and 0.1 · −1."""
    result = APOZero()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
