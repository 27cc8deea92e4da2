"""BCO against scalar arithmetic.

By hand, β = 0.1, βs = 0.2 and −0.1: softplus(−0.2) + softplus(−0.1) = 0.5981388693 + 0.6443966600.
"""

import pytest

from preftune.losses.bco_pair import BCOPair
from tests.oracles import log_sigmoid, logratios


def formula(pair, beta):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return -log_sigmoid(beta * w) - log_sigmoid(-beta * r)

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
def test_value_and_gradient(pair, beta, check_formula):
    check_formula(BCOPair(beta=beta), pair, formula(pair, beta))


@pytest.mark.parametrize(("knobs", "expected"), [({"beta": 0.1}, 0.5981388693 + 0.6443966600)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = BCOPair(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · 2 and 0.1 · −1."""
    result = BCOPair()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
