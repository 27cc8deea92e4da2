"""Checkpoints under faults: each is told, with file and remedy, and nothing good is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preftune import ExperimentConfig, train
from preftune.errors import CheckpointError
from preftune.recipes import start_model
from preftune.training.loop import TrainingLoop
from preftune.training.run_folder import plan_start
from tests.runs import arguments, pretend_unfinished, read_metrics, tiny_settings

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]
FILES += ["reference.safetensors", "state.json", "manifest.json"]


def settings_of(root: Path, **overrides):
    options = {"checkpointing_steps": 2, "keep_last_n_checkpoints": None}
    options |= {"sync_reference": True, "reference_sync_steps": 2, "learning_rate": 1e-3}
    return tiny_settings(root, **(options | overrides))


def settings(root: Path, **overrides):
    return ExperimentConfig(**settings_of(root, **overrides))


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
    before = {path: path.read_bytes() for path in files_of(run)}
    with pytest.raises(CheckpointError, match=text) as caught:
        train(settings(straight, output_dir=run))
    assert f"{newest} is damaged" in str(caught.value)
    assert "delete that folder to go on from the one before it" in str(caught.value)
    assert {path: path.read_bytes() for path in files_of(run)} == before
    return newest


def assert_told_and_recovered(straight: Path, run: Path, text: str) -> None:
    """Once it is deleted, too, the checkpoint before it leads to the end."""
    shutil.rmtree(assert_told(straight, run, text))
    train(settings(straight, output_dir=run))
    assert read_metrics(run) == read_metrics(straight / "run")
    assert same_files(run / "final", straight / "run" / "final")


def files_of(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file())


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
    with pytest.raises(CheckpointError, match="has format 1, and this preftune reads 3"):
        train(settings(straight, output_dir=killed))


def test_times_do_not_choose_the_checkpoint(straight, killed):
    """A clock that was set back, or a copy that sets new times: the step counts."""
    for path in (killed / "checkpoints" / "step-00000002").iterdir():
        os.utime(path, (4e9, 4e9))
    for path in (killed / "checkpoints" / "step-00000004").iterdir():
        os.utime(path, (0, 0))
    start = plan_start(settings(straight, output_dir=killed))
    assert start.checkpoint == killed / "checkpoints" / "step-00000004"


KILLED = """
import json, os, shutil, signal, sys
from preftune.cli.main import main
from preftune.distributed import runtime  # as all that a run imports: children have it by then
from preftune.recipes import train
from preftune.training import checkpoint

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def half(path, tensors, _):
    written = write_tensors(path, tensors)
    if path.name == "optimizer.safetensors" and path.parent.name.endswith("4"):
        os.truncate(path, written.size // 2)
        kill()
    return written

def prune(path, **options):
    if path.name == ".deleted-step-00000002" and path.exists():
        (path / "model.safetensors").unlink()
        kill()
    rmtree(path, **options)

def run(instant, words):
    if instant == "writing":
        checkpoint.write_tensors = half
    elif instant == "renaming":
        put = checkpoint._put_in_place
        checkpoint._put_in_place = lambda a, b: kill() if b.name.endswith("4") else put(a, b)
    else:
        shutil.rmtree = prune
    os._exit(main(["train", *words]))

write_tensors, rmtree = checkpoint.write_tensors, shutil.rmtree
for instant, words in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        run(instant, words)
    print(os.waitpid(child, 0)[1])
"""
LEFT = {
    "writing": [".partial-step-00000004", "step-00000002"],
    "renaming": [".partial-step-00000004", "step-00000002"],
    "pruning": [".deleted-step-00000002", "step-00000004"],
}
KEEP_ONE = {"keep_last_n_checkpoints": 1}


@pytest.fixture(scope="module")
def killed_in_a_save(straight, tmp_path_factory) -> Path:
    """Runs by the instant of their kill -9, each in a child of one process that ran no model."""
    root = tmp_path_factory.mktemp("killed")
    words = {
        instant: arguments(settings_of(straight, output_dir=root / instant, **KEEP_ONE))
        for instant in LEFT
    }
    result = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.stdout.splitlines()[-3:] == [str(int(signal.SIGKILL))] * 3, result.stderr
    return root


@pytest.mark.parametrize("instant", LEFT)
def test_a_kill_inside_a_save_leaves_only_whole_checkpoints(straight, killed_in_a_save, instant):
    """Half-way; then the same command goes on to the same end."""
    run = killed_in_a_save / instant
    checkpoints = run / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == LEFT[instant]
    train(settings(straight, output_dir=run, **KEEP_ONE))
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000006"]
    assert read_metrics(run) == read_metrics(straight / "run")
    assert same_files(run / "final", straight / "run" / "final")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of its own; call it with options to mount it again."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def test_a_full_disk_is_told_and_with_space_again_it_goes_on(straight, small_disk):
    """A small file system that holds two of the three checkpoints."""
    size = sum(p.stat().st_size for p in (straight / "run").rglob("step-00000004/*"))
    run = small_disk(f"size={round(2.7 * size)}") / "run"
    with pytest.raises(CheckpointError, match=r"step-00000006 could not be written .*No space"):
        train(settings(straight, output_dir=run))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004"]
    small_disk(f"remount,size={20 * size}")
    train(settings(straight, output_dir=run))
    assert read_metrics(run) == read_metrics(straight / "run")
    assert same_files(run / "final", straight / "run" / "final")


def test_a_disk_that_turns_read_only_is_told_and_when_writable_it_goes_on(
    straight, small_disk, monkeypatch
):
    run = small_disk("size=100m") / "run"
    one_step = TrainingLoop._one_step

    def acting(self, micro_batches):
        if self.state.step == 3:
            self.settle()
            small_disk("remount,ro")
        one_step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_one_step", acting)
        with pytest.raises(CheckpointError, match=r"step-00000004 could not be .*Read-only"):
            train(settings(straight, output_dir=run, logging_steps=6))
    with pytest.raises(CheckpointError, match=r"output_dir is .* is not writable"):
        train(settings(straight, output_dir=run, logging_steps=6))
    small_disk("remount,rw")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002"]
    train(settings(straight, output_dir=run, logging_steps=6))
    assert same_files(run / "final", straight / "run" / "final")


def test_a_second_run_in_the_same_folder_is_refused_at_once(straight, tmp_path, monkeypatch):
    """While the first one trains: told before anything loads, and the first goes on unharmed."""
    config = settings(straight, output_dir=tmp_path / "run")
    one_step, told = TrainingLoop._one_step, []

    def acting(self, micro_batches):
        if self.state.step == 3:
            with pytest.raises(CheckpointError, match="another process is working in") as caught:
                train(config)
            told.append(caught)
        one_step(self, micro_batches)

    monkeypatch.setattr(TrainingLoop, "_one_step", acting)
    train(config)
    assert len(told) == 1
    assert read_metrics(tmp_path / "run") == read_metrics(straight / "run")


@pytest.mark.parametrize("before", [False, True])
def test_a_run_that_was_overtaken_touches_nothing(straight, tmp_path, monkeypatch, before):
    """Another command finishes the run after this one has planned its start: new, or at step 2."""
    config = settings(straight, output_dir=tmp_path / "run")
    if before:
        shutil.copytree(straight / "run", tmp_path / "run")
        pretend_unfinished(tmp_path / "run", 2)
    load, nested = start_model.load_model, []

    def overtaken(*args):
        if not nested:
            nested.append(True)
            train(config)
            nested.append({p: p.read_bytes() for p in files_of(tmp_path / "run")})
        return load(*args)

    monkeypatch.setattr(start_model, "load_model", overtaken)
    with pytest.raises(CheckpointError, match="another process has worked in"):
        train(config)
    assert {p: p.read_bytes() for p in files_of(tmp_path / "run")} == nested[1]
    assert train(config).manifest["status"] == "finished"
