"""Length-normalised DPO against scalar arithmetic.

By hand, log-ratios 2 over 4 tokens and −1 over 2, β = 5: z = 5 · (0.5 + 0.5) = 5,
log(1 + e^−5) = log(1.0067379470) = 0.0067153485; with ε = 0.1 it gains 0.1 · 5 = 0.5067153485.
"""

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import DPO, DPONorm, PairLogps

nats = st.floats(-500, 0, allow_subnormal=False)


def formula(pair, beta, eps):
    def value(chosen, rejected):
        chosen_mean = (chosen - pair.ref_chosen) / pair.chosen_length
        rejected_mean = (rejected - pair.ref_rejected) / pair.rejected_length
        z = beta * (chosen_mean - rejected_mean)
        return (1 - eps) * mpmath.log1p(mpmath.exp(-z)) + eps * mpmath.log1p(mpmath.exp(z))

    return value


@pytest.mark.parametrize("beta", [0.1, 5.0, 12.5])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_value_and_gradient(pair, beta, eps, check_formula):
    check_formula(DPONorm(beta=beta, label_smoothing=eps), pair, formula(pair, beta, eps))


@pytest.mark.parametrize(("eps", "expected"), [(0.0, 0.0067153485), (0.1, 0.5067153485)])
def test_constant_by_hand(eps, expected, pairs, make_batch):
    result = DPONorm(label_smoothing=eps)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-10)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ)/|y|: 5 · 2/4 = 2.5 and 5 · −1/2 = −2.5."""
    result = DPONorm()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(2.5)
    assert result.rejected_rewards.item() == pytest.approx(-2.5)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def one(chosen, rejected, ref_chosen, ref_rejected, n=1, m=1) -> PairLogps:
    def t(x):
        return torch.tensor([x], dtype=torch.float64)

    lengths = torch.tensor([n]), torch.tensor([m])
    return PairLogps(t(chosen), t(rejected), *lengths, t(ref_chosen), t(ref_rejected))


@given(nats, nats, nats, nats, st.floats(0, 0.49))
def test_is_dpo_where_every_answer_has_one_token(c, r, rc, rr, eps):
    logps = one(c, r, rc, rr)
    norm, plain = DPONorm(0.3, eps)(logps), DPO(0.3, eps)(logps)
    assert torch.equal(norm.values, plain.values)
    assert torch.equal(norm.chosen_rewards, plain.chosen_rewards)
    assert torch.equal(norm.rejected_rewards, plain.rejected_rewards)


@given(nats, nats, nats, nats, st.integers(1, 4096), st.integers(1, 4096))
def test_swapping_the_answers_flips_the_margin(c, r, rc, rr, n, m):
    loss = DPONorm()
    ahead, behind = loss(one(c, r, rc, rr, n, m)), loss(one(r, c, rr, rc, m, n))
    margin = (ahead.chosen_rewards - ahead.rejected_rewards).item()
    assert ahead.values.item() - behind.values.item() == pytest.approx(-margin, abs=1e-9)
