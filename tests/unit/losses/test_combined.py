"""Sums of losses against their parts.

By hand, the pair "preferred": dpo 0.5543552445 (test_dpo), bco_pair at β = 0.1 1.2425355293
(test_bco_pair), and −(−10)/4 = 2.5 nats a token of the chosen answer.
"""

from dataclasses import replace

import pytest
import torch

from preftune.losses import Combined, DPOLossType, combine, make_loss
from preftune.losses.bco_pair import BCOPair
from preftune.losses.dpo import DPO
from preftune.losses.simpo import SimPO
from preftune.losses.wpo import WPO

BOTH = (DPO(beta=0.1), BCOPair(beta=0.1))


def test_constants_by_hand(pairs, make_batch):
    logps = make_batch([pairs["preferred"]])
    mpo = Combined(BOTH, (0.8, 0.2), sft_weight=1.0)(logps)
    assert mpo.values.item() == pytest.approx(0.8 * 0.5543552445 + 0.2 * 1.2425355293 + 2.5)
    rpo = Combined(BOTH[:1], (1.0,), sft_weight=0.2)(logps)
    assert rpo.values.item() == pytest.approx(0.5543552445 + 0.5)


def test_the_gradient_is_the_sum_of_gradients(pair, make_batch):
    def slopes(loss):
        logps = make_batch([pair], grad=True)
        return torch.stack(
            torch.autograd.grad(loss(logps).values.sum(), [logps.chosen, logps.rejected])
        )

    fine_tuning = torch.tensor([[-0.5 / pair.chosen_length], [0.0]], dtype=torch.float64)
    expected = 2 * slopes(BOTH[0]) + 3 * slopes(BOTH[1]) + fine_tuning
    torch.testing.assert_close(slopes(Combined(BOTH, (2.0, 3.0), 0.5)), expected)


def test_rewards_are_those_of_the_first(pair, make_batch):
    logps = make_batch([pair])
    both, first = Combined(BOTH, (0.5, 1.0))(logps), BOTH[0](logps)
    assert torch.equal(both.chosen_rewards, first.chosen_rewards)
    assert torch.equal(both.rejected_rewards, first.rejected_rewards)


def test_the_value_at_the_reference_adds_up(at_reference):
    """With the three pairs' −π_w/|y_w|: 10/4, 700.25/512 and 10/3."""
    loss = Combined(BOTH, (0.8, 0.2), sft_weight=0.5)
    stated = 1.2 * 0.6931471806 + 0.5 * (2.5 + 700.25 / 512 + 10 / 3) / 3
    assert loss.value_at_reference(at_reference) == pytest.approx(stated, rel=1e-9)
    assert loss(at_reference).values.mean().item() == pytest.approx(stated, rel=1e-9)
    assert Combined((DPO(), SimPO()), (1.0, 1.0)).value_at_reference(at_reference) is None


def test_the_mean_over_tokens_by_hand(pairs, make_batch):
    """−10 over 4 tokens and −700.25 over 512: 710.25 / 516 over all, 1.38 nats a token."""
    logps = make_batch([pairs["preferred"], pairs["long"]])
    loss = Combined(BOTH[:1], (1.0,), 1.0, "token")
    beside = BOTH[0](logps).values
    assert (loss(logps).values - beside).mean().item() == pytest.approx(710.25 / 516)
    # Cut in two: the length is that of the whole batch.
    halves = [make_batch([pairs[name]]) for name in ("preferred", "long")]
    cut = [loss(replace(half, mean_chosen_length=258.0)).values for half in halves]
    torch.testing.assert_close(torch.cat(cut), loss(logps).values)


def test_weights_of_tokens_leave_fine_tuning_alone(pairs, make_batch):
    logps = make_batch([pairs["preferred"]])
    weighted = replace(logps, chosen=logps.chosen / 2, plain_chosen=logps.chosen)
    for reduction in ("sequence", "token"):
        loss = Combined(BOTH[:1], (1.0,), 1.0, reduction)
        term = loss(weighted).values - BOTH[0](weighted).values
        assert term.item() == pytest.approx(2.5)


def test_alignments_are_read_where_one_loss_reads_them():
    assert Combined((DPO(), WPO()), (1.0, 1.0)).reads_alignment
    assert not Combined((DPO(), WPO(wpo_alignment="none")), (1.0, 1.0)).reads_alignment


def test_one_loss_stays_itself():
    loss = make_loss(DPOLossType.IPO)
    assert combine([loss], [1.0], 0.0) is loss
    assert combine([loss], [2.0], 0.0) == Combined((loss,), (2.0,))
    assert combine([loss], [1.0], 0.1) == Combined((loss,), (1.0,), 0.1)


@pytest.mark.parametrize(
    ("weights", "sft_weight", "message"),
    [
        ((1.0,), 0.0, "2 losses and 1 weights"),
        ((1.0, 0.0), 0.0, "weights must be above 0"),
        ((1.0, 1.0), -0.1, "sft_weight at least 0"),
    ],
)
def test_bad_weights_are_refused(weights, sft_weight, message):
    with pytest.raises(ValueError, match=message):
        Combined(BOTH, weights, sft_weight)
