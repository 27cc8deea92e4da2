"""Runs leave a report behind, and never end for want of one."""

import json

import pytest

from preftune.errors import Interrupted
from preftune.recipes.train import train
from preftune.report import page as module
from tests.runs import read_metrics, tiny_config

EVALUATED = {"test_size": 5, "eval_strategy": "steps", "eval_steps": 2}


def written(monkeypatch):
    """The reports as they are written, with the last step that each knows."""
    seen, write = [], module.write_report

    def noted(roots):
        path = write(roots)
        seen.append((len(read_metrics(roots[0])), path.read_text("utf-8")))
        return path

    monkeypatch.setattr(module, "write_report", noted)
    return seen


def test_a_report_is_written_at_each_evaluation_and_at_the_end(tmp_path, monkeypatch):
    seen = written(monkeypatch)
    result = train(tiny_config(tmp_path, **EVALUATED))
    assert [lines for lines, _ in seen] == [2, 4, 4]
    assert "2 of 4 steps" in seen[0][1]
    last = result.folder.report.read_text("utf-8")
    assert last == seen[-1][1]
    assert "<dd>finished</dd>" in last
    assert "Held-out rows" in last
    lengths = json.loads(result.folder.manifest.read_text())["data"]["train"]["num_tokens"]
    assert list(lengths) == ["prompt", "chosen", "rejected"]
    assert lengths["chosen"]["shortest"] <= lengths["chosen"]["median"]


def test_a_run_that_is_interrupted_has_one_too(tmp_path):
    with pytest.raises(Interrupted):
        train(tiny_config(tmp_path, checkpointing_steps=1, max_run_time="1s", num_epochs=4000.0))
    assert "<dd>interrupted</dd>" in (tmp_path / "run" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("x")])
def test_a_report_that_cannot_be_written_is_told_and_stops_nothing(
    tmp_path, monkeypatch, capsys, error
):
    def fail(roots):
        raise error

    monkeypatch.setattr(module, "write_report", fail)
    result = train(tiny_config(tmp_path, **EVALUATED, progress="plain"))
    assert result.manifest["status"] == "finished"
    assert not result.folder.report.exists()
    said = capsys.readouterr().err
    assert said.count("report.html was not written") == 3
    assert "preftune report" in said
