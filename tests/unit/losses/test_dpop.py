"""DPO-Positive against scalar arithmetic.

By hand, s_w = 2 is above 0: DPO with β = 0.3, softplus(−0.9) = 0.3411538747. The pair at
s_w = −2.5, s_l = 2.25, β = 0.3, λ = 50: z = 0.3 · (−4.75 − 125) = −38.925, and
softplus(38.925) = 38.925.
"""

import mpmath
import pytest

from preftune.losses.dpop import DPOP
from tests.oracles import log_sigmoid, logratios


def formula(pair, beta, weight):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return -log_sigmoid(beta * (w - r - weight * max(mpmath.mpf(0), -w)))

    return value


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.5, 50.0])
def test_value_and_gradient(pair, beta, weight, check_formula):
    if pair.chosen == pair.ref_chosen:
        pytest.skip("no derivative at s_w = 0, see test_the_slope_at_the_reference")
    check_formula(DPOP(beta=beta, dpop_lambda=weight), pair, formula(pair, beta, weight))


@pytest.mark.parametrize(
    ("name", "expected"), [("preferred", 0.3411538747), ("not_preferred", 38.925)]
)
def test_constant_by_hand(name, expected, pairs, make_batch):
    assert DPOP()(make_batch([pairs[name]])).values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.3 · 2 and 0.3 · −1."""
    result = DPOP()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.6)
    assert result.rejected_rewards.item() == pytest.approx(-0.3)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_the_slope_at_the_reference_is_that_of_dpo(pairs, make_batch):
    """−β/2 and β/2: the penalty's slope starts below 0."""
    logps = make_batch([pairs["at_reference"]], grad=True)
    DPOP()(logps).values.sum().backward()
    assert logps.chosen.grad.item() == pytest.approx(-0.15)
    assert logps.rejected.grad.item() == pytest.approx(0.15)
