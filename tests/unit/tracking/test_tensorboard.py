"""Event files, read back by TensorBoard itself."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from preftune.errors import ConfigError
from preftune.tracking import tracker
from preftune.tracking.tracker import check_trackers, open_tracker


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    first = open_tracker("tensorboard", tmp_path, 0)
    for step in (1, 2, 3):
        first.append({"step": step, "loss": step / 4, "eval/loss": 1.0})
    first.close()
    # Stopped after the checkpoint of step 2: step 3 is trained again.
    again = open_tracker("tensorboard", tmp_path, 2)
    again.append({"step": 3, "loss": 0.5})
    again.close()
    assert scalars(tmp_path, "loss") == [(1, 0.25), (2, 0.5), (3, 0.5)]
    assert scalars(tmp_path, "eval/loss") == [(1, 1.0), (2, 1.0)]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(["tensorboard"])
    check_trackers(None)
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"report_to is 'tensorboard'.*preftune\[tensorboard\]"):
        check_trackers(["tensorboard"])
