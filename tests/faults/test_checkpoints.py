"""Checkpoints under faults: each is told, with file and remedy, and nothing good is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from preftune import train
from preftune.errors import CheckpointError
from preftune.training.run_folder import plan_start
from tests.runs import pretend_unfinished, read_metrics, tiny_config

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]
FILES += ["reference.safetensors", "state.json", "manifest.json"]


def settings(root: Path, **overrides):
    options = {"checkpointing_steps": 2, "keep_last_n_checkpoints": None, "num_epochs": 2.0}
    options |= {"sync_reference": True, "reference_sync_steps": 2, "learning_rate": 1e-3}
    return tiny_config(root, **(options | overrides))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Six steps, with checkpoints after 2, 4 and 6."""
    root = tmp_path_factory.mktemp("straight")
    train(settings(root))
    return root


@pytest.fixture
def killed(straight, tmp_path) -> Path:
    """The run folder as a kill after step 4 leaves it."""
    shutil.copytree(straight / "run", tmp_path / "run")
    pretend_unfinished(tmp_path / "run", 4)
    return tmp_path / "run"


def assert_told(straight: Path, run: Path, text: str) -> Path:
    """The newest checkpoint, which is refused with its remedy; nothing changes."""
    newest = run / "checkpoints" / "step-00000004"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=text) as caught:
        train(settings(straight, output_dir=run))
    assert f"{newest} is damaged" in str(caught.value)
    assert "delete that folder to go on from the one before it" in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    return newest


def assert_told_and_recovered(straight: Path, run: Path, text: str) -> None:
    """Once it is deleted, too, the checkpoint before it leads to the end."""
    shutil.rmtree(assert_told(straight, run, text))
    train(settings(straight, output_dir=run))
    assert read_metrics(run) == read_metrics(straight / "run")
    assert same_files(run / "final", straight / "run" / "final")


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["truncated", "flipped", "deleted"])
def test_a_damaged_file_is_named(straight, killed, name, fault):
    path = killed / "checkpoints" / "step-00000004" / name
    content = bytearray(path.read_bytes())
    if fault == "deleted":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[-2] ^= 1
        path.write_bytes(content)
    assert_told(straight, killed, f"is damaged: {name}")


@pytest.mark.parametrize("place", [3, 12, 200])
def test_a_flipped_bit_in_a_header_is_damage_not_another_model(straight, killed, place):
    """In the header's length, in the name of a tensor, in a shape."""
    path = killed / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: model\.safetensors"):
        train(settings(straight, output_dir=killed))


def test_an_additional_file_is_named(straight, killed):
    (killed / "checkpoints" / "step-00000004" / "optimizer.bin").write_bytes(b"")
    assert_told_and_recovered(straight, killed, r"optimizer\.bin does not belong there")


def test_an_empty_folder_is_no_checkpoint_and_told(straight, killed):
    shutil.rmtree(killed / "checkpoints" / "step-00000004")
    (killed / "checkpoints" / "step-00000004").mkdir()
    assert_told_and_recovered(straight, killed, r"manifest\.json is absent")


def test_an_older_format_is_told(straight, killed):
    newest = killed / "checkpoints" / "step-00000004"
    (newest / "manifest.json").unlink()
    (newest / "state.json").write_text(json.dumps({"version": 1, "step": 4}))
    with pytest.raises(CheckpointError, match="has format 1, and this preftune reads 2"):
        train(settings(straight, output_dir=killed))


def test_times_do_not_choose_the_checkpoint(straight, killed):
    """A clock that was set back, or a copy that sets new times: the step counts."""
    for path in (killed / "checkpoints" / "step-00000002").iterdir():
        os.utime(path, (4e9, 4e9))
    for path in (killed / "checkpoints" / "step-00000004").iterdir():
        os.utime(path, (0, 0))
    start = plan_start(settings(straight, output_dir=killed))
    assert start.checkpoint == killed / "checkpoints" / "step-00000004"
