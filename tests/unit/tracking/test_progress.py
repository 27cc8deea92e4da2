"""Progress says how fast and how long; a stage may run inside another."""

import pytest
from rich.console import Console

from preftune.tracking.progress import ProgressDisplay


def test_plain_lines_tell_rate_and_time_left(capsys):
    with ProgressDisplay("plain").stage("train", 4, "step") as update:
        update(1, {"loss": 0.5})
        update(4, {"loss": 0.25})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: 1/4")
    assert "step/s" in lines[0]
    assert "left" in lines[0]
    assert "loss 0.25" in lines[-1]


@pytest.mark.parametrize("style", ["rich", "plain", "none"])
def test_stages_nest(style):
    display = ProgressDisplay(style)
    display._console = Console(force_terminal=True, quiet=True)
    with display.stage("train", 2, "step") as outer:
        outer(1)
        with display.stage("evaluate", 3, "pair") as inner:
            inner(3)
            display.say("in between")
        outer(2, {"loss": 0.1})
    with display.stage("again", 1, "step") as update:
        update(1)


def test_other_ranks_and_none_are_silent(capsys):
    for display in (ProgressDisplay("none"), ProgressDisplay("plain", is_main=False)):
        display.say("hello")
        with display.stage("train", 1, "step") as update:
            update(1)
    assert capsys.readouterr().err == ""
