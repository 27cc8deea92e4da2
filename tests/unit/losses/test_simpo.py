"""SimPO against scalar arithmetic.

By hand, −10 over 4 tokens and −9 over 2, β = 2, γ/β = 0.5: z = 2 · (−2.5 + 4.5 − 0.5) = 3,
log(1 + e^−3) = log(1.0497870684) = 0.0485873516; with ε = 0.1 it gains 0.1 · 3 = 0.3485873516.
"""

from dataclasses import replace

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import PairLogps, SimPO

nats = st.floats(-500, 0, allow_subnormal=False)


def formula(pair, beta, ratio, eps):
    def value(chosen, rejected):
        z = beta * (chosen / pair.chosen_length - rejected / pair.rejected_length - ratio)
        return (1 - eps) * mpmath.log1p(mpmath.exp(-z)) + eps * mpmath.log1p(mpmath.exp(z))

    return value


@pytest.mark.parametrize("beta", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.6])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_value_and_gradient(pair, beta, ratio, eps, check_formula):
    loss = SimPO(beta=beta, gamma_beta_ratio=ratio, label_smoothing=eps)
    check_formula(loss, pair, formula(pair, beta, ratio, eps))


@pytest.mark.parametrize(("eps", "expected"), [(0.0, 0.0485873516), (0.1, 0.3485873516)])
def test_constant_by_hand(eps, expected, pairs, make_batch):
    result = SimPO(label_smoothing=eps)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-10)


def test_rewards_by_hand(pairs, make_batch):
    """β π/|y|, the target not in it: 2 · −10/4 = −5 and 2 · −9/2 = −9."""
    result = SimPO()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(-5.0)
    assert result.rejected_rewards.item() == pytest.approx(-9.0)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_the_reference_is_not_read(pair, make_batch):
    logps = make_batch([pair])
    bare = replace(logps, ref_chosen=None, ref_rejected=None)
    wild = replace(logps, ref_chosen=logps.ref_chosen - 77, ref_rejected=logps.chosen * torch.nan)
    loss = SimPO()
    assert torch.equal(loss(bare).values, loss(logps).values)
    assert torch.equal(loss(bare).values, loss(wild).values)


@given(nats, nats, st.integers(1, 4096), st.integers(1, 4096))
def test_swapping_the_answers_flips_the_margin(c, r, n, m):
    """Without a target: with one, both orders are short of it."""

    def one(c, r, n, m) -> PairLogps:
        sums = (torch.tensor([x], dtype=torch.float64) for x in (c, r))
        return PairLogps(*sums, torch.tensor([n]), torch.tensor([m]))

    loss = SimPO(gamma_beta_ratio=0.0)
    ahead, behind = loss(one(c, r, n, m)), loss(one(r, c, m, n))
    margin = (ahead.chosen_rewards - ahead.rejected_rewards).item()
    assert ahead.values.item() - behind.values.item() == pytest.approx(-margin, abs=1e-9)


def test_the_first_value_is_no_constant(at_reference):
    assert SimPO().value_at_reference(at_reference) is None
