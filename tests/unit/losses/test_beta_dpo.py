"""β-DPO against scalar arithmetic.

By hand, two pairs, h = 3 and −4.75, mean −0.875. First batch: M = 0.1 · −0.875 = −0.0875, so
b = 0.1 · (1 + 0.6 · −0.7875) = 0.05275. With M before it at 1: M = 0.9 − 0.0875 = 0.8125,
b = 0.1 · (1 + 0.6 · −1.6875) = −0.00125, below the least: 0.001.
"""

import dataclasses

import mpmath
import pytest
import torch

from preftune.losses import DPOLossType, combine, make_loss
from preftune.losses.beta_dpo import BetaDPO
from tests.oracles import log_sigmoid, logratios


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize(("alpha", "momentum"), [(0.0, 0.9), (0.6, 0.9), (0.1, 0.0)])
def test_value_and_gradient(pair, beta, alpha, momentum, check_formula):
    """b is worked out from the pair's numbers, so that it is constant to `diff`."""
    h = (pair.chosen - pair.ref_chosen) - (pair.rejected - pair.ref_rejected)
    dynamic = max(mpmath.mpf("0.001"), beta * (1 + alpha * momentum * mpmath.mpf(h)))

    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return -log_sigmoid(dynamic * (w - r))

    loss = BetaDPO(beta=beta, beta_dpo_alpha=alpha, beta_dpo_momentum=momentum)
    check_formula(loss, pair, value)


@pytest.mark.parametrize(
    ("before", "mean", "beta"), [(None, -0.0875, 0.05275), (1.0, 0.8125, 0.001)]
)
def test_two_batches_by_hand(before, mean, beta, pairs, make_batch):
    logps = make_batch([pairs["preferred"], pairs["not_preferred"]], grad=True)
    kept = None if before is None else torch.tensor(before).double()
    logps, loss = dataclasses.replace(logps, running=kept), BetaDPO()
    running = loss.next_running(logps)
    assert running.item() == pytest.approx(mean)
    assert not running.requires_grad
    expected = [float(-log_sigmoid(beta * h)) for h in (3, mpmath.mpf("-4.75"))]
    assert loss(logps).values.tolist() == pytest.approx(expected)


def test_a_sum_keeps_what_beta_dpo_keeps(pairs, make_batch):
    logps = make_batch([pairs["preferred"], pairs["not_preferred"]])
    both = combine([make_loss(DPOLossType.IPO), BetaDPO()], [1.0, 0.5], 0.0)
    assert both.needs_global_batch
    assert both.next_running(logps) == BetaDPO().next_running(logps)
    assert make_loss(DPOLossType.IPO).next_running(logps) is None
