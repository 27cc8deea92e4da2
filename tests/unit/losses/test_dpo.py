"""DPO against scalar arithmetic.

By hand, h = 3, β = 0.1: −log σ(0.3) = log(1 + e^−0.3) = log(1.7408182207) = 0.5543552445;
with ε = 0.1: 0.9 · 0.5543552445 + 0.1 · 0.8543552445 = 0.5843552445 (the second is 0.3 more).
"""

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import PairLogps
from preftune.losses.dpo import DPO
from tests.oracles import divergence_score, log_sigmoid, logratios

nats = st.floats(-500, 0, allow_subnormal=False)


def formula(pair, beta, eps):
    def value(chosen, rejected):
        z = beta * ((chosen - pair.ref_chosen) - (rejected - pair.ref_rejected))
        return (1 - eps) * mpmath.log1p(mpmath.exp(-z)) + eps * mpmath.log1p(mpmath.exp(z))

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_value_and_gradient(pair, beta, eps, check_formula):
    check_formula(DPO(beta=beta, label_smoothing=eps), pair, formula(pair, beta, eps))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_other_divergences(divergence, alpha, pairs, check_formula):
    """Up to 30 nats from the reference on either side; beyond, see the clamp."""
    for chosen, rejected in ((-10.0, -9.0), (-40.0, -9.0), (-2.5, -30.0)):
        pair = replace(pairs["preferred"], chosen=chosen, rejected=rejected)

        def value(chosen, rejected, pair=pair):
            w, r = (
                divergence_score(s, divergence, alpha) for s in logratios(pair, chosen, rejected)
            )
            return -log_sigmoid((w - r) / 10)

        loss = DPO(beta=0.1, f_divergence=divergence, f_divergence_alpha=alpha)
        check_formula(loss, pair, value)


def test_divergences_by_hand(pairs, make_batch):
    """s = 2 and −1: 1 − e^−s; log 2 + logσ(s); with alpha ½, 2(1 − e^(−s/2))."""
    expected = {
        "forward_kl": (0.8646647168, -1.7182818285),
        "js": (0.5662191695, -0.6201145070),
        "alpha": (1.2642411177, -1.2974425414),
    }
    for divergence, rewards in expected.items():
        result = DPO(beta=1.0, f_divergence=divergence)(make_batch([pairs["preferred"]]))
        assert result.chosen_rewards.item() == pytest.approx(rewards[0], abs=1e-9)
        assert result.rejected_rewards.item() == pytest.approx(rewards[1], abs=1e-9)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 80.0), (torch.float16, 11.0)])
def test_the_clamp_of_divergences(dtype, largest, pairs, make_batch):
    """Below −80 nats (fp16: −11) the score of forward KL stays at 1 − e^80, and has no slope."""
    pair = replace(pairs["at_reference"], chosen=-200.0, ref_chosen=-100.0)
    logps = make_batch([pair], dtype, grad=True)
    result = DPO(beta=1.0, f_divergence="forward_kl")(logps)
    result.values.sum().backward()
    assert result.chosen_rewards.item() == pytest.approx(1 - math.exp(largest), rel=1e-2)
    assert logps.chosen.grad.item() == 0


@pytest.mark.parametrize(("eps", "expected"), [(0.0, 0.5543552445), (0.1, 0.5843552445)])
def test_constant_by_hand(eps, expected, pairs, make_batch):
    result = DPO(beta=0.1, label_smoothing=eps)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-10)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · (−10 + 12) = 0.2 and 0.1 · (−9 + 8) = −0.1."""
    result = DPO(beta=0.1)(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def one(chosen, rejected, ref_chosen, ref_rejected) -> PairLogps:
    def t(x):
        return torch.tensor([x], dtype=torch.float64)

    n = torch.tensor([3])
    return PairLogps(t(chosen), t(rejected), n, n, t(ref_chosen), t(ref_rejected))


@given(nats, nats, nats, nats)
def test_swapping_the_answers_flips_the_margin(c, r, rc, rr):
    """log(1 + e^−z) − log(1 + e^z) = −z, and the rewards change places."""
    loss = DPO(beta=0.1)
    ahead, behind = loss(one(c, r, rc, rr)), loss(one(r, c, rr, rc))
    margin = (ahead.chosen_rewards - ahead.rejected_rewards).item()
    assert ahead.values.item() - behind.values.item() == pytest.approx(-margin, abs=1e-9)
    assert ahead.chosen_rewards.item() == behind.rejected_rewards.item()
    assert ahead.rejected_rewards.item() == behind.chosen_rewards.item()


@given(nats, nats, nats, nats, st.floats(-100, 100), st.floats(-100, 100))
def test_a_common_shift_of_policy_and_reference_changes_nothing(c, r, rc, rr, x, y):
    loss = DPO(beta=0.3, label_smoothing=0.2)
    moved = loss(one(c + x, r + y, rc + x, rr + y)).values.item()
    assert moved == pytest.approx(loss(one(c, r, rc, rr)).values.item(), abs=1e-9)


@given(nats, nats, st.floats(0, 0.49))
def test_ln_2_at_the_reference(c, r, eps):
    logps = one(c, r, c, r)
    loss = DPO(label_smoothing=eps)
    assert loss(logps).values.item() == pytest.approx(math.log(2), abs=1e-12)
    assert loss.value_at_reference(logps) == math.log(2)


def test_lengths_are_not_read(pairs, make_batch):
    short, long = pairs["preferred"], replace(pairs["preferred"], chosen_length=900)
    values = DPO()(make_batch([short, long])).values
    assert values[0] == values[1]
