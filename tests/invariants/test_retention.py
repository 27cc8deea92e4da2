"""Which checkpoints stay: the newest, the best, and what fits."""

import json
import shutil
from pathlib import Path

import pytest

from preftune import train
from preftune.errors import CheckpointError, ConfigError
from preftune.training import retention
from preftune.training.retention import BestCheckpoint, remove_old_checkpoints
from preftune.training.run_folder import RunFolder
from tests.runs import pretend_unfinished, read_metrics, read_state, tiny_config

ACCURACY = "eval/rewards/accuracies"


def settings(root: Path, **overrides):
    """Evaluated after every step; checkpoints are due after 4 and 6."""
    options = {"test_size": 5, "eval_steps": 1, "checkpointing_steps": 4, "num_epochs": None}
    options |= {"max_train_steps": 6, "metric_for_best_model": "eval/loss", "learning_rate": 1e-2}
    return tiny_config(root, **(options | overrides))


def make(root: Path, *steps: int, size: int = 100) -> RunFolder:
    folder = RunFolder(root)
    for step in steps:
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / "file").write_bytes(bytes(size))
    return folder


def steps(folder: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in folder.list_checkpoints()]


@pytest.mark.parametrize(
    ("keep", "max_gb", "best", "left"),
    [
        (None, None, None, [1, 2, 3, 4, 100_000_000]),
        (2, None, None, [4, 100_000_000]),
        (2, None, 1, [1, 4, 100_000_000]),
        (2, None, 4, [4, 100_000_000]),
        (None, 300e-9, None, [3, 4, 100_000_000]),
        (None, 300e-9, 1, [1, 4, 100_000_000]),
        (1, 300e-9, None, [100_000_000]),
        (4, 250e-9, 2, [2, 100_000_000]),
        (None, 1e-9, 1, [1, 100_000_000]),
    ],
)
def test_what_stays(tmp_path, keep, max_gb, best, left):
    folder = make(tmp_path, 1, 2, 3, 4, 100_000_000)
    (folder.checkpoints / ".deleted-step-00000000").mkdir()
    remove_old_checkpoints(folder, keep, max_gb, best)
    assert steps(folder) == left
    assert len(list(folder.checkpoints.iterdir())) == len(left)


def test_pruning_that_is_killed_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """A kill inside the deletion of a folder: it is no checkpoint any more, and goes next time."""
    folder = make(tmp_path, 1, 2, 3)

    def killed(path, *, ignore_errors=False):
        if path.exists():
            (path / "file").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.discard(folder.checkpoint(1))
    assert steps(folder) == [2, 3]
    remove_old_checkpoints(folder, None)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]


def test_what_cannot_be_deleted_is_told(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, 2)

    def refuse(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(retention, "discard", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be deleted.*Read-only.*newest is complete"):
        remove_old_checkpoints(folder, 1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    train(settings(root, keep_last_n_checkpoints=1))
    return root


def best_of(run: Path, metric: str, *, greater: bool) -> tuple[int, float]:
    values = [(line[metric], -line["step"]) for line in read_metrics(run)]
    value, step = max(values) if greater else min((v, -s) for v, s in values)
    return (-step if greater else step), value


def test_the_best_checkpoint_stays_beside_the_last(straight):
    run = straight / "run"
    step, value = best_of(run, "eval/loss", greater=False)
    best = json.loads((run / "run.json").read_text())["best_checkpoint"]
    assert best == {
        "metric": "eval/loss",
        "greater_is_better": False,
        "value": value,
        "step": step,
        "path": f"checkpoints/step-{step:08d}",
    }
    assert read_state(run / best["path"])["best"] == {k: v for k, v in best.items() if k != "path"}
    assert steps(RunFolder(run)) == sorted({step, 6})


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_resumed_run_goes_on_with_the_best_so_far(straight, tmp_path, after):
    options = {"keep_last_n_checkpoints": None, "checkpointing_steps": 1}
    options |= {"metric_for_best_model": ACCURACY, "learning_rate": 3e-2}
    first = settings(straight, output_dir=tmp_path / "first", **options)
    manifest = train(first).manifest
    step, value = best_of(tmp_path / "first", ACCURACY, greater=True)
    assert (manifest["best_checkpoint"]["step"], manifest["best_checkpoint"]["value"]) == (
        step,
        value,
    )
    pretend_unfinished(tmp_path / "first", after)
    again = train(first).manifest
    assert again["best_checkpoint"] == manifest["best_checkpoint"]


def test_a_metric_that_no_evaluation_gives_is_told_with_those_there_are(straight, tmp_path):
    options = {"output_dir": tmp_path / "run", "metric_for_best_model": "eval/rewards/margin/loss"}
    with pytest.raises(ConfigError, match=r"evaluation gives eval/logps/chosen, .*eval/loss"):
        train(settings(straight, **options))
    train(settings(straight, **options | {"metric_for_best_model": "eval/loss"}))
    assert read_metrics(tmp_path / "run") == read_metrics(straight / "run")


def test_no_number_is_never_the_best():
    best = BestCheckpoint("eval/loss", greater_is_better=False)
    assert not best.is_beaten_by({"eval/loss": float("nan")})
    best.take({"eval/loss": 1.0}, 1)
    assert not best.is_beaten_by({"eval/loss": float("nan")})
    assert not best.is_beaten_by({"eval/loss": 1.0})
    assert best.is_beaten_by({"eval/loss": 0.5})


def test_a_best_that_is_gone_or_by_another_measure_is_not_gone_on_with(tmp_path):
    folder = make(tmp_path, 3)
    saved = {"metric": "eval/loss", "greater_is_better": False, "value": 1.0, "step": 3}
    for changed, step in (({}, 3), ({"step": 2}, None), ({"greater_is_better": True}, None)):
        best = BestCheckpoint("eval/loss", greater_is_better=False)
        best.restore(saved | changed, folder)
        assert best.step == step


def test_checkpoints_take_no_more_than_they_may(straight, tmp_path):
    size = sum(p.stat().st_size for p in (straight / "run").rglob("step-00000006/*"))
    options = {"metric_for_best_model": None, "eval_steps": 6, "checkpointing_steps": 1}
    options |= {"keep_last_n_checkpoints": None, "checkpoint_max_gb": 2.5 * size / 1e9}
    folder = train(settings(straight, output_dir=tmp_path / "run", **options)).folder
    assert steps(folder) == [5, 6]
