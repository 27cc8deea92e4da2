"""Progress says how fast and how long, at any width; stages nest; nothing is written across it."""

import io
import logging
import re
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from rich.console import Console

from preftune.tracking import progress
from preftune.tracking.progress import ProgressDisplay


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def screen(console: Console) -> list[str]:
    """What is on a terminal after all that was written: lines that were erased are gone."""
    lines, place = [""], 0
    for part in re.split(r"(\n|\r|\x1b\[1A|\x1b\[2K|\x1b\[\?25[lh])", console.file.getvalue()):
        if part == "\n":
            place += 1
            lines += [""] if place == len(lines) else []
        elif part == "\x1b[1A":
            place -= 1
        elif part == "\x1b[2K":
            lines[place] = ""
        elif part != "\r" and not part.startswith("\x1b"):
            lines[place] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_plain_lines_tell_rate_and_time_left_and_the_last_values(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with ProgressDisplay("plain").stage("train", 4, "step") as update:
        update(1, {"loss": 0.5})
        update(2)
        update(4, {"loss": 0.25})
        update(4)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"train: 1/4  [\d.]+ step/s  0:\d\d left  loss 0.5", lines[0])
    assert re.fullmatch(r"train: 2/4  [\d.]+ step/s  0:\d\d left  loss 0.5", lines[1])
    assert re.fullmatch(r"train: 4/4  [\d.]+ step/s  0:\d\d  loss 0.25", lines[2])
    assert len(lines) == 3


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_live_view_fits_the_terminal(width, monkeypatch):
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=count(step=1000).__next__))
    console = terminal(width)
    display = ProgressDisplay("rich", console=console)
    values = {"loss": 0.6931, "margin": 0.1203, "accuracy": 0.75, "peak GiB": 4.718}
    with display.stage("train", 60_000, "step") as update:
        update(12_345, values)
        with display.stage("evaluate a-held-out-set-of-a-very-long-name", 2_000, "pair") as inner:
            inner(1_000)
            display._live.refresh()
            train, evaluate, shown = screen(console)
    assert max(map(len, (train, evaluate, shown))) <= width
    assert re.search(r"^train +[━╸╺ ]+ 12345/60000 [\d.]+ step/s  [\d:]+ left$", train)
    assert "1000/2000" in evaluate
    assert evaluate.startswith("evaluate a-hel")
    assert shown == "  loss 0.6931  margin 0.1203  accuracy 0.75  peak GiB 4.718"[:width]


def test_what_is_said_or_logged_or_warned_stands_above_the_view():
    console = terminal(80)
    display = ProgressDisplay("rich", console=console)
    logger, handler = logging.getLogger("a.library"), logging.StreamHandler(sys.__stderr__)
    logger.addHandler(handler)
    with display.stage("train", 2, "step") as update:
        update(1, {"loss": 0.5})
        display.say("said")
        logger.warning("logged")
        sys.stderr.write("warned\n")  # as Python's warnings do
        display._live.refresh()
        lines = screen(console)
        update(2)
    logger.removeHandler(handler)
    assert handler.stream is sys.__stderr__
    assert lines[:-2] == ["said", "logged", "warned"]
    assert lines[-2].startswith("train ")
    assert lines[-1] == "  loss 0.5"


def test_lines_break_between_words_and_paths_do_not():
    path = "/a/" + "long/" * 20
    console = terminal(40)
    display = ProgressDisplay("rich", console=console)
    display.say(f"a line that has more words than fit, and a path {path}")
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "a line that has more words than fit, and"
    assert lines[-1] == path


@pytest.mark.parametrize("style", ["rich", "plain", "none"])
def test_stages_nest(style):
    display = ProgressDisplay(style, console=terminal(80))
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
