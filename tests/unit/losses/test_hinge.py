"""The hinge loss against scalar arithmetic.

By hand, s_w − s_l = 3: β = 0.05 gives 1 − 0.15 = 0.85; β = 0.5 is past the margin: 0.
"""

import mpmath
import pytest

from preftune.losses.hinge import Hinge
from tests.oracles import divergence_score, logratios


def formula(pair, beta, divergence):
    def value(chosen, rejected):
        w, r = (divergence_score(s, divergence, 0.5) for s in logratios(pair, chosen, rejected))
        return max(mpmath.mpf(0), 1 - beta * (w - r))

    return value


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.5])
@pytest.mark.parametrize("divergence", ["reverse_kl", "js"])
def test_value_and_gradient(pair, beta, divergence, check_formula):
    check_formula(Hinge(beta=beta, f_divergence=divergence), pair, formula(pair, beta, divergence))


@pytest.mark.parametrize(("knobs", "expected"), [({}, 0.85), ({"beta": 0.5}, 0.0)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = Hinge(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.05 · 2 and 0.05 · −1."""
    result = Hinge()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.1)
    assert result.rejected_rewards.item() == pytest.approx(-0.05)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_no_gradient_past_the_margin(pairs, make_batch):
    logps = make_batch([pairs["preferred"]], grad=True)
    Hinge(beta=0.5)(logps).values.sum().backward()
    assert logps.chosen.grad.item() == logps.rejected.grad.item() == 0
