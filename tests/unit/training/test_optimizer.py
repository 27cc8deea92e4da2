"""Schedules are pure functions with the familiar shapes; weight decay spares norms."""

import math

import pytest
import torch

from preftune.config.training import TrainingConfig
from preftune.training.optimizer import make_optimizer, make_schedule, warmup_steps


def rates(name: str, steps: int = 20, **options) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, lr_scheduler_type=name, **options)
    schedule = make_schedule(config, steps)
    return [schedule(step) for step in range(steps)]


def test_linear_rises_then_falls_to_the_end():
    got = rates("linear", warmup_steps=4)
    assert got[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert got[12] == pytest.approx((20 - 12) / 16)


def test_cosine_is_half_way_down_in_the_middle():
    got = rates("cosine", warmup_steps=0)
    assert got[0] == 1.0
    assert got[10] == pytest.approx(0.5)
    assert got[5] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_cosine_with_min_lr_stops_at_a_tenth():
    config = TrainingConfig(
        learning_rate=1.0, lr_scheduler_type="cosine_with_min_lr", warmup_steps=0
    )
    assert make_schedule(config, 20)(20) == pytest.approx(0.1)


def test_constant_ones_stay():
    assert rates("constant") == [1.0] * 20
    assert rates("constant_with_warmup", warmup_steps=2)[1:4] == pytest.approx([0.5, 1.0, 1.0])


def test_polynomial_falls_linearly_to_zero():
    assert rates("polynomial", warmup_steps=0)[15] == pytest.approx(0.25)


def test_inverse_sqrt_halves_after_four_times_the_warm_up():
    got = rates("inverse_sqrt", warmup_steps=4)
    assert got[16] == pytest.approx(0.5 * got[4])


def test_wsd_decays_in_its_last_tenth():
    got = rates("wsd", warmup_steps=2)
    assert got[2:18] == pytest.approx([1.0] * 16)
    assert got[19] < 1.0


def test_warm_up_is_a_share_rounded_up_or_a_count():
    assert warmup_steps(TrainingConfig(warmup_ratio=0.1), 25) == 3
    assert warmup_steps(TrainingConfig(warmup_steps=7), 25) == 7


def test_weight_decay_spares_one_dimensional_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.1, adam_beta1=0.9))
    decay = {
        p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert decay == {2: 0.1, 1: 0.0}
