"""A run with all trackers that stops and goes on is one run in each store, each step once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import train
from preftune.cli.main import main
from preftune.tracking import tracker
from tests import stores
from tests.runs import arguments, read_metrics, tiny_config, tiny_settings

ALL = ["tensorboard", "wandb", "trackio", "mlflow"]

pytestmark = pytest.mark.filterwarnings(stores.PANDAS)


class Stop(Exception):
    """Ends a run from within."""


def settings(root: Path, **overrides):
    """Six steps, a checkpoint every second one."""
    named = {"exp_name": f"of {root.name}", "checkpointing_steps": 2, "report_to": ALL}
    return tiny_settings(root, **(named | overrides))


def assert_each_step_once(run: Path, uri: str, steps: list[int]) -> None:
    """In all stores, with the values of metrics.jsonl."""
    manifest = json.loads((run / "run.json").read_text())
    project, run_id = manifest["config"]["exp_name"], manifest["run_id"]
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == steps
    for name in ("loss", "rewards/margins", "grad_norm"):
        expected = [(int(line["step"]), line[name]) for line in metrics]
        assert stores.wandb_scalars(run, name) == expected
        assert stores.trackio_scalars(project, run_id, name) == expected
        assert stores.mlflow_scalars(uri, project, name) == expected
        rounded = [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
        assert stores.tensorboard_scalars(run, name) == rounded  # it holds fp32
    records = stores.wandb_records(run)
    assert [r.run.run_id for r in records if r.WhichOneof("record_type") == "run"] == [run_id]
    _, in_mlflow = stores.mlflow_run(uri, project)
    facts = in_mlflow.data.params
    assert facts["learning_rate"] == "0.001"
    assert facts["model_fingerprint"] == manifest["model"]["weights"]
    assert facts["dataset_fingerprint"]


def test_a_run_that_stops_and_goes_on(tmp_path):
    def stop(step, rows):
        if step == 6:
            raise Stop

    with stores.own_stores(tmp_path) as uri:
        with pytest.raises(Stop):
            train(tiny_config(tmp_path, **settings(tmp_path)), on_step=stop)
        # Step 5 was handed over, and is trained again.
        assert stores.mlflow_run(uri, f"of {tmp_path.name}")[1].info.status == "FAILED"
        train(tiny_config(tmp_path, **settings(tmp_path)))
        assert_each_step_once(tmp_path / "run", uri, [1, 2, 3, 4, 5, 6])
        assert stores.mlflow_run(uri, f"of {tmp_path.name}")[1].info.status == "FINISHED"


def test_trackers_that_fail_cost_no_step(tmp_path, monkeypatch, capsys):
    """A server that nobody runs, and a tracker that raises."""

    class Broken:
        last_step = -1

        def append(self, step, metrics, samples):
            raise RuntimeError("broken by hf_" + "A" * 30)

        def close(self, status):
            pass

    def opened(name, run):
        return Broken() if name == "trackio" else tracker.open_tracker(name, run)

    monkeypatch.setattr("preftune.recipes.run.open_tracker", opened)
    options = settings(tmp_path, report_to=["mlflow", "trackio"], progress="plain")
    with stores.own_stores(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        assert main(["train", *arguments(options)]) == 0
    told = capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert told.count("mlflow does not take metrics") == 1
    assert told.count("trackio does not take metrics (RuntimeError: broken by REDACTED)") == 1
    assert "mlflow did not get the metrics of every step" in told


@pytest.mark.parametrize("command", ["check", "train"])
def test_wandb_without_an_account_is_refused(tmp_path, capsys, command):
    options = settings(tmp_path, report_to="wandb")
    with stores.own_stores(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")
        assert main([command, *arguments(options)]) == 2
    told = capsys.readouterr().err
    assert "report_to is 'wandb', and no key of an account is found; `wandb login`" in told
    assert not (tmp_path / "run").exists()


CHILD = """
import os, signal, sys
from pathlib import Path
from preftune import train
from tests.invariants.test_trackers import settings
from tests.runs import tiny_config

def on_step(step, rows):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

train(tiny_config(Path(sys.argv[1]), **settings(Path(sys.argv[1]))), on_step=on_step)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_twice(tmp_path):
    with stores.own_stores(tmp_path) as uri:
        for step in (4, 6):
            child = [sys.executable, "-c", CHILD, str(tmp_path), str(step)]
            ended = subprocess.run(child, cwd=Path(__file__).parents[2], env=os.environ.copy())
            assert ended.returncode == -signal.SIGKILL
        train(tiny_config(tmp_path, **settings(tmp_path)))
        assert_each_step_once(tmp_path / "run", uri, [1, 2, 3, 4, 5, 6])
