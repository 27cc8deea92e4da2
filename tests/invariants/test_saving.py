"""Checkpoints written beside the training are those that training would have waited for."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from preftune import train
from preftune.errors import CheckpointError
from preftune.recipes import checkpoints as module
from preftune.training.checkpoint import Snapshot
from preftune.training.saver import CheckpointSaver, HostCopies
from tests.runs import pretend_unfinished, read_metrics, read_state, tiny_config

STEPS = range(1, 7)


def settings(root: Path, **overrides):
    options = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None, "logging_steps": 4}
    options |= {"sync_reference": True, "reference_sync_steps": 1, "learning_rate": 1e-2}
    return tiny_config(root, **(options | overrides))


def content(run: Path, step: int) -> dict[str, object]:
    """Everything in a checkpoint but the configuration, which says how it was written.

    Timings make the length of metrics.jsonl differ: what counts is the lines up to there.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    del files["manifest.json"]
    generators = load(files.pop("rng.safetensors"))
    del generators["0/python"]  # the checks of shapes under pytest draw from it, on two threads
    document = read_state(folder) | {"config": None}
    lines = (run / "metrics.jsonl").read_bytes()[: document.pop("metrics_offset")]
    files |= {name: tensor.tolist() for name, tensor in generators.items()}
    return files | {"state.json": document, "lines": lines.count(b"\n")}


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("waited")
    train(settings(root, checkpoint_async=False))
    return root


def slowly(monkeypatch, seconds: float = 0.004) -> None:
    """Copy each tensor so late that without a guard the next step would long be done."""
    copy = HostCopies._copy

    def late(self, key, tensor):
        time.sleep(seconds)
        return copy(self, key, tensor)

    monkeypatch.setattr(HostCopies, "_copy", late)


def same(one: Path, other: Path) -> list[bool]:
    return [content(one, step) == content(other, step) for step in STEPS]


def test_a_checkpoint_is_the_same_bytes_while_training_goes_on(waited_for, monkeypatch):
    slowly(monkeypatch)
    train(settings(waited_for, output_dir=waited_for / "beside"))
    assert same(waited_for / "run", waited_for / "beside") == [True] * 6


def test_the_test_above_sees_an_update_that_does_not_wait(waited_for, monkeypatch):
    slowly(monkeypatch)
    monkeypatch.setattr(CheckpointSaver, "_before_update", lambda *_: None)
    train(settings(waited_for, output_dir=waited_for / "torn"))
    assert not all(same(waited_for / "run", waited_for / "torn"))


def test_one_save_at_a_time_and_all_before_the_end(waited_for, monkeypatch):
    """The training thread never writes; no two writes overlap; the end waits for the last."""
    threads, inside = [], threading.Semaphore(1)
    write = module.write_checkpoint

    def recorded(folder, content):
        assert inside.acquire(blocking=False)
        threads.append(threading.current_thread())
        time.sleep(0.1)
        write(folder, content)
        inside.release()

    monkeypatch.setattr(module, "write_checkpoint", recorded)
    folder = train(settings(waited_for, output_dir=waited_for / "one")).folder
    assert len(threads) == len(folder.list_checkpoints()) == 6
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("background", [True, False])
def test_an_error_in_the_background_is_told_as_any(waited_for, tmp_path, monkeypatch, background):
    """At the next step, with the same words; what was saved before leads to the same end."""
    write, failed_at = module.write_checkpoint, []

    def failing(folder, content):
        if folder.name == "step-00000003" and not failed_at:
            failed_at.append(folder)
            (folder.parent / f".partial-{folder.name}").write_bytes(b"")  # a file in the way
        write(folder, content)

    monkeypatch.setattr(module, "write_checkpoint", failing)
    options = {"output_dir": tmp_path / "run", "checkpoint_async": background}
    with pytest.raises(CheckpointError, match=r"step-00000003 could not be written .*earlier"):
        train(settings(waited_for, **options))
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert sorted(names) == ["step-00000001", "step-00000002"]
    (tmp_path / "run" / "checkpoints" / ".partial-step-00000003").unlink()
    train(settings(waited_for, **options))
    assert same(waited_for / "run", tmp_path / "run") == [True] * 6
    assert read_metrics(waited_for / "run") == read_metrics(tmp_path / "run")


def test_an_error_in_the_last_save_is_told_too(waited_for, tmp_path, monkeypatch):
    def failing(folder, content):
        raise CheckpointError("no space")

    shutil.copytree(waited_for / "run", tmp_path / "run")
    pretend_unfinished(tmp_path / "run", 5)
    monkeypatch.setattr(module, "write_checkpoint", failing)
    with pytest.raises(CheckpointError, match="no space"):
        train(settings(waited_for, output_dir=tmp_path / "run"))
    assert not (tmp_path / "run" / "final").exists()


def test_a_copy_that_does_not_fit_is_not_made(waited_for, monkeypatch, capsys):
    monkeypatch.setattr("preftune.training.saver.available_bytes", lambda: 1000)
    made = []
    monkeypatch.setattr(HostCopies, "of", lambda *_: made.append(1))
    options = {"output_dir": waited_for / "small", "progress": "plain"}
    train(settings(waited_for, **options))
    assert same(waited_for / "run", waited_for / "small") == [True] * 6
    assert not made
    assert "training waits for this checkpoint" in capsys.readouterr().err


def test_the_memory_of_copies_is_taken_once():
    copies = HostCopies(torch.device("cpu"))
    tensors = {"a": torch.arange(5), "b": torch.randn(3, 4).T, "c": torch.tensor(2.0).bfloat16()}
    first = copies.of(Snapshot({"file": tensors}, {})).tensors["file"]
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert all(torch.equal(first[name], tensors[name]) for name in tensors)
    tensors["a"] += 1
    assert not torch.equal(first["a"], tensors["a"])
    second = copies.of(Snapshot({"file": tensors}, {})).tensors["file"]
    assert torch.equal(second["a"], tensors["a"])
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses
