"""ODPO against scalar arithmetic.

By hand, β = 0.1, s_w − s_l = 3, Δ = 0.75: softplus(0.75 − 0.3) = softplus(0.45) = 0.9432489460;
with α = 2, softplus(1.2) = 1.4632824673.
"""

import pytest

from preftune.losses.odpo import ODPO
from tests.oracles import log_sigmoid, logratios


def formula(pair, beta, alpha):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return -log_sigmoid(beta * (w - r) - alpha * pair.margin)

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.5])
def test_value_and_gradient(pair, beta, alpha, check_formula):
    check_formula(ODPO(beta=beta, odpo_alpha=alpha), pair, formula(pair, beta, alpha))


@pytest.mark.parametrize(
    ("knobs", "expected"), [({}, 0.9432489460), ({"odpo_alpha": 2.0}, 1.4632824673)]
)
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = ODPO(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · 2 and 0.1 · −1."""
    result = ODPO()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
