"""The loss scale against PyTorch's own rule, and where ours ends."""

import random

import torch

from preftune.training import loss_scale
from preftune.training.loss_scale import LossScale

CPU = torch.device("cpu")


def flag(value: bool) -> torch.Tensor:
    return torch.tensor(value)


def test_the_scale_goes_the_way_of_pytorchs(monkeypatch):
    """`torch._amp_update_scale_` is what GradScaler calls."""
    monkeypatch.setattr(loss_scale, "PATIENCE", 3)
    ours, theirs = LossScale(CPU), torch.tensor(65536.0)
    tracker, rng, seen = torch.zeros((), dtype=torch.int32), random.Random(0), set()
    for step in range(200):
        overflowed = rng.random() < 0.15
        torch._amp_update_scale_(theirs, tracker, flag(overflowed).float(), 2.0, 0.5, 3)
        ours.follow(good=flag(not overflowed), overflowed=flag(overflowed))
        assert (float(ours.value), int(ours.good_steps)) == (float(theirs), int(tracker)), step
        seen.add(float(ours.value))
    assert len(seen) > 5


def test_it_grows_after_2000_good_steps_by_default():
    scale = LossScale(CPU)
    scale.restore({"value": 65536.0, "good_steps": 1998, "num_skipped": 4})
    for expected in (65536.0, 131072.0):
        scale.follow(good=flag(True), overflowed=flag(False))
        assert float(scale.value) == expected
    assert scale.state() == {"value": 131072.0, "good_steps": 0, "num_skipped": 4}


def test_it_ends_at_1_and_far_from_the_end_of_fp32():
    scale = LossScale(CPU)
    scale.restore({"value": 2.0, "good_steps": 0, "num_skipped": 0})
    assert scale.can_fall
    scale.follow(good=flag(False), overflowed=flag(True))
    assert scale.state() == {"value": 1.0, "good_steps": 0, "num_skipped": 1}
    assert not scale.can_fall
    scale.restore({"value": loss_scale.LARGEST, "good_steps": 1999, "num_skipped": 0})
    scale.follow(good=flag(True), overflowed=flag(False))
    assert float(scale.value) == loss_scale.LARGEST


def test_a_step_that_is_neither_changes_nothing():
    scale = LossScale(CPU)
    scale.follow(good=flag(True), overflowed=flag(False))
    before = scale.state()
    scale.follow(good=flag(False), overflowed=flag(False))
    assert scale.state() == before == {"value": 65536.0, "good_steps": 1, "num_skipped": 0}
