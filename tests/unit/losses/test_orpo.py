"""ORPO against scalar arithmetic.

By hand, −10 over 4 tokens and −9 over 2: e^−2.5 = 0.0820849986, odds 0.0894254951; e^−4.5 =
0.0111089965, odds 0.0112337942. Their ratio is 7.9604, and 2.5 + 0.1 · log(1 + 1/7.9603998…) is
2.5 + 0.1 · 0.1183356 = 2.5118336.
"""

import math

import mpmath
import pytest
import torch

from preftune.losses import PairLogps
from preftune.losses.orpo import ORPO
from tests.oracles import log_sigmoid


def odds(mean):
    return mpmath.exp(mean) / (1 - mpmath.exp(mean))


def formula(pair, beta):
    def value(chosen, rejected):
        w, r = chosen / pair.chosen_length, rejected / pair.rejected_length
        return -w - beta * log_sigmoid(mpmath.log(odds(w) / odds(r)))

    return value


@pytest.mark.parametrize("beta", [0.1, 0.25, 2.5])
def test_value_and_gradient(pair, beta, check_formula):
    check_formula(ORPO(beta=beta), pair, formula(pair, beta))


def test_constant_by_hand(pairs, make_batch):
    result = ORPO()(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(2.5118336, abs=1e-7)


def test_rewards_are_log_odds(pairs, make_batch):
    """β log(0.0894254951) = −0.2414 and β log(0.0112337942) = −0.4489."""
    result = ORPO()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(-0.24143, abs=1e-5)
    assert result.rejected_rewards.item() == pytest.approx(-0.44888, abs=1e-5)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_certain_answers_have_bounded_odds():
    """Mean log-probs of 0 count as −1e-6: log odds of 13.8, and no slope of the odds ratio."""
    sums = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    result = ORPO()(PairLogps(*sums, torch.tensor([1]), torch.tensor([1])))
    result.values.sum().backward()
    assert result.chosen_rewards.item() == pytest.approx(0.1 * -math.log(1e-6), abs=1e-6)
    assert result.values.item() == pytest.approx(0.1 * math.log(2))
    assert [x.grad.item() for x in sums] == [-1, 0]
