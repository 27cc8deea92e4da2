"""Signals and the time limit: save and go on, or save and stop, on every rank."""

import signal
import time
from pathlib import Path

import pytest

from preftune import train
from preftune.errors import Interrupted
from preftune.training.loop import TrainingLoop
from tests.launches import torchrun
from tests.runs import arguments, read_metrics, tiny_config, tiny_settings


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    train(tiny_config(root))
    return root


def after_step(monkeypatch, step: int, act) -> None:
    """Do something inside a step, as a signal or the clock would."""
    one_step = TrainingLoop._one_step

    def acting(self, micro_batches):
        one_step(self, micro_batches)
        if self.state.step == step:
            act(self)

    monkeypatch.setattr(TrainingLoop, "_one_step", acting)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_sigusr1_saves_and_goes_on(straight, tmp_path, monkeypatch):
    after_step(monkeypatch, 2, lambda loop: signal.raise_signal(signal.SIGUSR1))
    train(tiny_config(straight, output_dir=tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == ["step-00000002"]
    assert read_metrics(tmp_path / "run") == read_metrics(straight / "run")


def test_sigusr1_before_the_first_step_ends_nothing(straight, tmp_path, monkeypatch):
    from preftune.recipes import start_model

    load = start_model.load_model

    def loading(*args):
        signal.raise_signal(signal.SIGUSR1)
        return load(*args)

    monkeypatch.setattr(start_model, "load_model", loading)
    train(tiny_config(straight, output_dir=tmp_path / "run"))
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops(straight, tmp_path, monkeypatch, name):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda loop: signal.raise_signal(signal.Signals[name]))
        with pytest.raises(Interrupted, match=rf"{name} received: stopped after step 3 of 6"):
            train(tiny_config(straight, output_dir=run))
    assert checkpoints(run) == ["step-00000003"]
    train(tiny_config(straight, output_dir=run))
    assert read_metrics(run) == read_metrics(straight / "run")


def test_the_time_limit_saves_and_stops_and_the_same_command_goes_on(
    straight, tmp_path, monkeypatch
):
    config = tiny_config(straight, output_dir=tmp_path / "run", max_run_time="1h")
    with monkeypatch.context() as patch:

        def hours_later(loop):
            assert 3500 < loop.deadline - time.monotonic() < 3600
            loop.deadline = time.monotonic()

        after_step(patch, 4, hours_later)
        with pytest.raises(Interrupted, match=r"max_run_time 1h is up: .*step 4 of 6.*same comm"):
            train(config)
    assert checkpoints(tmp_path / "run") == ["step-00000004"]
    train(config)
    assert read_metrics(tmp_path / "run") == read_metrics(straight / "run")


def test_at_the_last_step_the_run_just_ends(straight, tmp_path, monkeypatch):
    after_step(monkeypatch, 6, lambda loop: signal.raise_signal(signal.SIGTERM))
    assert (
        train(tiny_config(straight, output_dir=tmp_path / "run")).manifest["status"] == "finished"
    )


LIMITED = """
import sys, time
from preftune.cli.main import main
from preftune.training.loop import TrainingLoop

one_step = TrainingLoop._one_step

def acting(self, micro_batches):
    one_step(self, micro_batches)
    if self.state.step == 2 and self.runtime.rank == 1:
        self.deadline = time.monotonic()

TrainingLoop._one_step = acting
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_agree_although_the_time_is_up_on_one(tmp_path):
    settings = tiny_settings(tmp_path, max_run_time="1h", gradient_accumulation_steps=1)
    result = torchrun(2, "-c", LIMITED, "train", *arguments(settings))
    assert result.returncode != 0
    assert result.stderr.count("max_run_time 1h is up: stopped after step 2 of 6") == 1
    assert "exitcode  : 75" in result.stderr
    assert checkpoints(tmp_path / "run") == ["step-00000002"]
