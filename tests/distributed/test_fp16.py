"""fp16 under every engine: see fp16_checks.py."""

from pathlib import Path

import pytest
import torch

from preftune import ExperimentConfig, train
from preftune.training import loss_scale
from tests.distributed.fp16_checks import LOW, settings, start_low, trace
from tests.launches import output_of

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_every_engine_takes_the_steps_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "START", LOW)  # so that start_low is undone
    monkeypatch.setattr(loss_scale, "PATIENCE", 2)
    start_low()
    torch.save(vars(trace(tmp_path / "references", 1)), tmp_path / "trace.pt")
    train(ExperimentConfig(**settings(tmp_path, tmp_path / "straight", 1)))
    printed = output_of(2, Path(__file__).with_name("fp16_checks.py"), tmp_path)
    assert printed.splitlines()[-1] == "all checks held"
