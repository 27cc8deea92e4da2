"""IPO against scalar arithmetic.

By hand, β = 0.1: the target is 5. Sums: (3 − 5)² = 4. Means, 2/4 and −1/2: (1 − 5)² = 16.
"""

import mpmath
import pytest

from preftune.losses.ipo import IPO
from tests.oracles import logratios


def formula(pair, beta, log_ratios):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        if log_ratios == "mean":
            w, r = w / pair.chosen_length, r / pair.rejected_length
        return (w - r - 1 / (2 * mpmath.mpf(beta))) ** 2

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("log_ratios", ["sum", "mean"])
def test_value_and_gradient(pair, beta, log_ratios, check_formula):
    loss = IPO(beta=beta, ipo_log_ratios=log_ratios)
    check_formula(loss, pair, formula(pair, beta, log_ratios))


@pytest.mark.parametrize(("knobs", "expected"), [({}, 4.0), ({"ipo_log_ratios": "mean"}, 16.0)])
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = IPO(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · 2 and 0.1 · −1."""
    result = IPO()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_rewards_of_means(pairs, make_batch):
    """β (π − ρ)/|y|: 0.1 · 2/4 and 0.1 · −1/2."""
    result = IPO(ipo_log_ratios="mean")(make_batch([pairs["preferred"]]))
    assert result.chosen_rewards.item() == pytest.approx(0.05)
    assert result.rejected_rewards.item() == pytest.approx(-0.05)
