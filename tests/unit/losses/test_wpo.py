"""WPO against scalar arithmetic.

By hand, h = 3, β = 0.1: DPO's value is 0.5543552445 (test_dpo). Alignments −0.5 and −0.25 give
w = e^−0.75 = 0.4723665527, so 0.2618588758. Without alignment, −10 over 4 tokens and −9 over 2
give w = e^−(2.5 + 4.5) = e^−7 = 0.0009118820, so 0.0005055066.
"""

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import DPO, WPO, PairLogps

anything = st.floats(-2e4, 2e4)


def formula(pair, beta, eps, alignment):
    """The weight is worked out from the pair's numbers, so that it is constant to `diff`."""
    if alignment == "sampled":
        exponent = pair.chosen_alignment + pair.rejected_alignment
    else:
        exponent = mpmath.mpf(pair.chosen) / pair.chosen_length
        exponent += mpmath.mpf(pair.rejected) / pair.rejected_length
    weight = min(mpmath.mpf(1), mpmath.exp(exponent))

    def value(chosen, rejected):
        z = beta * ((chosen - pair.ref_chosen) - (rejected - pair.ref_rejected))
        smoothed = (1 - eps) * mpmath.log1p(mpmath.exp(-z)) + eps * mpmath.log1p(mpmath.exp(z))
        return weight * smoothed

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("alignment", ["sampled", "none"])
def test_value_and_gradient(pair, beta, eps, alignment, check_formula):
    loss = WPO(beta=beta, label_smoothing=eps, wpo_alignment=alignment)
    check_formula(loss, pair, formula(pair, beta, eps, alignment))


@pytest.mark.parametrize(
    ("alignment", "expected"), [("sampled", 0.2618588758), ("none", 0.0005055066)]
)
def test_constant_by_hand(alignment, expected, pairs, make_batch):
    result = WPO(wpo_alignment=alignment)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-10)


def test_weights_of_tokens_leave_the_weight_of_a_pair_alone(pairs, make_batch):
    logps = make_batch([pairs["preferred"]])
    weighted = replace(
        logps,
        chosen=logps.chosen / 2,
        rejected=logps.rejected / 2,
        plain_chosen=logps.chosen,
        plain_rejected=logps.rejected,
    )
    loss = WPO(wpo_alignment="none")
    assert torch.equal(loss.weights(weighted), loss.weights(logps))


def test_the_cap_by_hand(pairs, make_batch):
    """Alignments 0.75 and 0.25 weigh e; capped, 1."""
    logps = make_batch([pairs["weight_capped"]])
    assert WPO().weights(logps).item() == 1
    assert WPO(wpo_cap="none").weights(logps).item() == pytest.approx(math.e, rel=1e-12)


def test_rewards_are_those_of_dpo(pair, make_batch):
    logps = make_batch([pair], grad=True)
    weighted, plain = WPO()(logps), DPO()(logps)
    assert torch.equal(weighted.chosen_rewards, plain.chosen_rewards)
    assert torch.equal(weighted.rejected_rewards, plain.rejected_rewards)
    assert not weighted.chosen_rewards.requires_grad
    assert not weighted.rejected_rewards.requires_grad


@pytest.mark.parametrize("alignment", ["sampled", "none"])
def test_no_gradient_flows_through_the_weight(alignment, pairs, make_batch):
    """Each pair's gradient is DPO's times its weight, and the alignments get none."""
    logps = make_batch([pairs["preferred"], pairs["not_preferred"]], grad=True)
    sides = [x.clone().requires_grad_() for x in (logps.chosen_alignment, logps.rejected_alignment)]
    logps = replace(logps, chosen_alignment=sides[0], rejected_alignment=sides[1])
    loss, inputs = WPO(wpo_alignment=alignment), [logps.chosen, logps.rejected]
    weights = loss.weights(logps)
    assert not weights.requires_grad
    got = torch.autograd.grad(loss(logps).values.sum(), [*inputs, *sides], allow_unused=True)
    plain = torch.autograd.grad(DPO()(logps).values.sum(), inputs)
    for weighted, unweighted in zip(got[:2], plain, strict=True):
        torch.testing.assert_close(weighted, weights * unweighted, rtol=1e-12, atol=0)
    assert got[2:] == (None, None)


@given(anything, anything, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_weight_is_in_0_to_1(a, b, dtype):
    logps = PairLogps(
        chosen=torch.tensor([a], dtype=dtype),
        rejected=torch.tensor([b], dtype=dtype),
        chosen_lengths=torch.tensor([1]),
        rejected_lengths=torch.tensor([1]),
        chosen_alignment=torch.tensor([a], dtype=dtype),
        rejected_alignment=torch.tensor([b], dtype=dtype),
    )
    for loss in (WPO(), WPO(wpo_alignment="none")):
        weight = loss.weights(logps)
        assert weight.dtype == dtype
        assert 0 <= weight.item() <= 1


def test_alignment_none_takes_means_not_sums(pairs, make_batch):
    """exp(−10/4 − 9/2) = e^−7; from the sums it would be e^−19."""
    weight = WPO(wpo_alignment="none").weights(make_batch([pairs["preferred"]]))
    assert weight.item() == pytest.approx(math.exp(-7), rel=1e-12)


@pytest.mark.parametrize("side", ["chosen_alignment", "rejected_alignment"])
def test_missing_alignment_is_named_and_read_only_if_asked_for(side, pair, make_batch):
    logps = replace(make_batch([pair]), **{side: None})
    with pytest.raises(ValueError, match="wpo with wpo_alignment 'sampled' reads"):
        WPO()(logps)
    assert WPO(wpo_alignment="none")(logps).values.isfinite().all()
    assert WPO().reads_alignment
    assert not WPO(wpo_alignment="none").reads_alignment


def test_ln_2_times_the_mean_weight_at_the_reference(at_reference):
    """Weights by hand: e^−0.75, e^0.0625 and e^1 capped to 1: mean (0.4723665527 + 2)/3."""
    expected = math.log(2) * (math.exp(-0.75) + 2) / 3
    assert WPO().value_at_reference(at_reference) == pytest.approx(expected, rel=1e-12)


def test_values_are_not_divided_by_the_weights(at_reference):
    values = WPO()(at_reference).values
    assert values.mean().item() < math.log(2) * 0.9
