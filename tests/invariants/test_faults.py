"""What goes wrong around a run: full disks, stray variables, other processes, other machines."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from preftune import train
from preftune.cli.main import main
from preftune.errors import CheckpointError, ConfigError
from preftune.files import hold_alone
from tests.runs import (
    arguments,
    edit_state,
    pretend_unfinished,
    read_metrics,
    read_state,
    tiny_config,
    tiny_settings,
)


def test_a_full_disk_is_told_and_harms_no_earlier_checkpoint(tmp_path):
    """A file size limit stands in for a full disk: the write fails in the middle."""
    settings = tiny_settings(tmp_path, checkpointing_steps=1)
    train(tiny_config(tmp_path, **settings | {"max_train_steps": 1, "num_epochs": None}))
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(
            json.loads((tmp_path / "run" / "run.json").read_text())
            | {"status": "running", "config": tiny_config(tmp_path, **settings).to_dict()},
            default=str,
        )
    )
    before = (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [sys.executable, "-m", "preftune", "train", *arguments(settings)]
    result = subprocess.run(
        command, preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "could not be written" in result.stderr
    assert "earlier checkpoints are untouched" in result.stderr
    assert "Traceback" not in result.stderr
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000001"]
    assert (tmp_path / "run" / "checkpoints" / left[0] / "state.json").read_bytes() == before


def test_a_stray_variable_does_not_scale_the_gradient(tmp_path, monkeypatch):
    one = read_metrics(train(tiny_config(tmp_path)).folder.root)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other = tiny_config(tmp_path, output_dir=tmp_path / "other")
    assert read_metrics(train(other).folder.root) == one


def test_the_last_step_makes_a_checkpoint(tmp_path):
    folder = train(tiny_config(tmp_path, checkpointing_steps=3)).folder
    assert [p.name for p in folder.list_checkpoints()] == ["step-00000003", "step-00000006"]


def test_two_processes_do_not_share_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    held = hold_alone(tmp_path / "run")
    with pytest.raises(CheckpointError, match="another process is working"):
        train(tiny_config(tmp_path))
    os.close(held)
    train(tiny_config(tmp_path))


def test_a_kill_before_the_manifest_leaves_a_usable_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.0123456789ab").write_text("{")
    assert train(tiny_config(tmp_path)).manifest["status"] == "finished"


@pytest.mark.parametrize(
    ("change", "text"),
    [({"pairs a step": 16}, "pairs a step"), ({"precision": "bf16"}, "precision")],
)
def test_another_machine_may_not_go_on_to_other_numbers(tmp_path, change, text):
    train(tiny_config(tmp_path, checkpointing_steps=2))
    pretend_unfinished(tmp_path / "run", 4)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    edit_state(checkpoint, identity=read_state(checkpoint)["identity"] | change)
    with pytest.raises(CheckpointError, match=text):
        train(tiny_config(tmp_path, checkpointing_steps=2))


def test_a_branch_from_a_checkpoint_goes_on_with_the_same_command(tmp_path):
    train(tiny_config(tmp_path, checkpointing_steps=1, keep_last_n_checkpoints=None))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    options = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None}
    options |= {"output_dir": tmp_path / "branch", "resume": checkpoint}
    train(tiny_config(tmp_path, **options))
    branch = tmp_path / "branch"
    (branch / "run.json").write_text(
        json.dumps(json.loads((branch / "run.json").read_text()) | {"status": "interrupted"})
    )
    shutil.rmtree(branch / "checkpoints" / "step-00000006")
    train(tiny_config(tmp_path, **options))
    assert read_metrics(branch) == read_metrics(tmp_path / "run")
    assert "resume: auto" in (branch / "config.yaml").read_text()


def test_bf16_weights_pass_the_first_check(tmp_path):
    config = tiny_config(tmp_path, dtype="bfloat16", mixed_precision="fp32", learning_rate=1e-2)
    assert train(config).manifest["status"] == "finished"


def test_a_warm_up_longer_than_the_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"warmup_steps is 6, and the run has 6 steps"):
        train(tiny_config(tmp_path, warmup_steps=6))
    one_step = tiny_config(tmp_path, max_train_steps=1, num_epochs=None)
    line = read_metrics(train(one_step).folder.root)[0]
    assert line["learning_rate"] == one_step.learning_rate


def test_the_order_of_the_data_does_not_move_the_split(tmp_path):
    first, second = (
        train(
            tiny_config(tmp_path, test_size=5, data_seed=seed, output_dir=tmp_path / str(seed))
        ).manifest["data"]["held_out"]["fingerprint"]
        for seed in (1, 2)
    )
    assert first == second


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_dir_is_refused_before_anything_loads(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="not writable"):
        train(tiny_config(tmp_path, output_dir=tmp_path / "locked" / "run"))


def test_a_file_in_the_way_of_output_dir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        train(tiny_config(tmp_path, output_dir=tmp_path / "file" / "run"))


def test_score_names_a_wrong_reference_before_it_scores(tmp_path, capsys):
    settings = tiny_settings(tmp_path)
    words = {
        "model_name_or_path": settings["model_name_or_path"],
        "reference_model_name_or_path": "./typo",
        "dataset_name": settings["dataset_name"],
    }
    assert main(["score", *arguments(words)]) == 2
    error = capsys.readouterr().err
    assert "reference_model_name_or_path is './typo'" in error
    assert "loading" not in error
