"""APO-down against scalar arithmetic.

By hand, β = 0.1, βs = 0.2 and −0.1: σ(0.2) + σ(−0.3) = 0.5498339973 + 0.4255574832.
"""

import pytest

from preftune.losses.apo_down import APODown
from tests.oracles import logratios, sigmoid


def formula(pair, beta):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return sigmoid(beta * w) + 1 - sigmoid(beta * (w - r))

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
def test_value_and_gradient(pair, beta, check_formula):
    check_formula(APODown(beta=beta), pair, formula(pair, beta))


@pytest.mark.parametrize(("knobs", "expected"), [({"beta": 0.1}, 0.5498339973 + 0.4255574832)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = APODown(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 1 · 2 and 1 · −1."""
    result = APODown()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(2.0)
    assert result.rejected_rewards.item() == pytest.approx(-1.0)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
