"""ORPO against scalar arithmetic.

By hand, −10 over 4 tokens and −9 over 2: e^−2.5 = 0.0820849986, odds 0.0894254951; e^−4.5 =
0.0111089965, odds 0.0112337942. Their ratio is 7.9604, and 2.5 + 0.1 · log(1 + 1/7.9603998…) is
2.5 + 0.1 · 0.1183356 = 2.5118336.
"""

import math
from dataclasses import replace

import mpmath
import pytest
import torch

from preftune.losses import PairLogps
from preftune.losses.orpo import ORPO
from tests.oracles import log_sigmoid


def odds(mean):
    return mpmath.exp(mean) / (1 - mpmath.exp(mean))


def formula(pair, beta, nll="answer"):
    def value(chosen, rejected):
        w, r = chosen / pair.chosen_length, rejected / pair.rejected_length
        mean = w
        if nll == "sequence":
            mean = (pair.prompt + chosen) / (pair.prompt_length + pair.chosen_length)
        return -mean - beta * log_sigmoid(mpmath.log(odds(w) / odds(r)))

    return value


@pytest.mark.parametrize("beta", [0.1, 0.25, 2.5])
@pytest.mark.parametrize("nll", ["answer", "sequence"])
def test_value_and_gradient(pair, beta, nll, check_formula):
    check_formula(ORPO(beta=beta, orpo_nll=nll), pair, formula(pair, beta, nll))


def test_constant_by_hand(pairs, make_batch):
    result = ORPO()(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(2.5118336, abs=1e-7)


def test_the_sequences_constant_by_hand(pairs, make_batch):
    """A prompt of −7 over 3 tokens: 17/7 = 2.4285714 in place of 2.5, and the same odds."""
    result = ORPO(orpo_nll="sequence")(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(2.5118336 - 2.5 + 17 / 7, abs=1e-7)


def test_the_prompt_is_trained_on_with_the_sequence_alone(pairs, make_batch):
    """Each of its 3 tokens counts as much as one of the answer's 4: 1/7."""
    batch = make_batch([pairs["preferred"]])
    batch.prompt.requires_grad_()
    ORPO(orpo_nll="sequence")(batch).values.sum().backward()
    assert batch.prompt.grad.item() == pytest.approx(-1 / 7)
    assert not ORPO()(batch).values.requires_grad


def test_prompts_that_were_not_scored_are_missed(pairs, make_batch):
    batch = replace(make_batch([pairs["preferred"]]), prompt=None)
    with pytest.raises(ValueError, match="score the prompts"):
        ORPO(orpo_nll="sequence")(batch)


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
