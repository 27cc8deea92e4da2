"""DiscoPOP against scalar arithmetic.

By hand, z = 0.05 · 3 = 0.15, τ = 0.05: m = σ(3) = 0.9525741268, and
−logσ(0.15) = 0.6209570690, e^−0.15 = 0.8607079764.
"""

import mpmath
import pytest

from preftune.losses.discopop import DiscoPOP
from tests.oracles import divergence_score, log_sigmoid, logratios, sigmoid


def formula(pair, beta, tau, divergence):
    def value(chosen, rejected):
        w, r = (divergence_score(s, divergence, 0.5) for s in logratios(pair, chosen, rejected))
        z = beta * (w - r)
        share = sigmoid(z / mpmath.mpf(tau))
        return -(1 - share) * log_sigmoid(z) + share * mpmath.exp(-z)

    return value


@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("beta", "divergence"), [(0.05, "reverse_kl"), (2.5, "js")])
def test_value_and_gradient(pair, beta, tau, divergence, check_formula):
    loss = DiscoPOP(beta=beta, discopop_tau=tau, f_divergence=divergence)
    check_formula(loss, pair, formula(pair, beta, tau, divergence))


@pytest.mark.parametrize(
    ("knobs", "expected"), [({}, 0.0474258732 * 0.6209570690 + 0.9525741268 * 0.8607079764)]
)
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = DiscoPOP(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.05 · 2 and 0.05 · −1."""
    result = DiscoPOP()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.1)
    assert result.rejected_rewards.item() == pytest.approx(-0.05)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
