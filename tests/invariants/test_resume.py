"""Twice is the same, and stopped-and-resumed is the same, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune import train
from preftune.errors import CheckpointError, ModelError
from tests.runs import edit_state, pretend_unfinished, read_metrics, read_state, tiny_config

SETTINGS = {"test_size": 5, "eval_steps": 2, "logging_steps": 2, "checkpointing_steps": 1}
"""16 pairs in batches of 6, 6 and 4: two epochs of 3 steps. Logging every second step leaves a
half-filled window in every other checkpoint."""


def settings(root: Path, **overrides):
    options = SETTINGS | {"per_device_train_batch_size": 3, "keep_last_n_checkpoints": None}
    return tiny_config(root, **(options | overrides))


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("straight")
    train(settings(root))
    return root


def stop_after(straight: Path, step: int, target: Path) -> None:
    """The run folder as a kill shortly before the checkpoint of `step + 1` leaves it."""
    shutil.copytree(straight / "run", target)
    pretend_unfinished(target, step)
    # What a killed write leaves must not be taken for a checkpoint.
    shutil.copytree(
        straight / "run" / "checkpoints" / "step-00000006",
        target / "checkpoints" / ".partial-step-00000006",
    )


def assert_same_run(one: Path, other: Path) -> None:
    assert read_metrics(one) == read_metrics(other)
    first, second = (load_file(run / "final" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_config_twice_gives_the_same_bits(straight):
    train(settings(straight, output_dir=straight / "again"))
    assert_same_run(straight / "run", straight / "again")


def test_choices_of_the_start_are_kept(straight, tmp_path):
    """In run.json and in checkpoints; what is recorded is taken, not chosen again."""
    manifest = json.loads((straight / "run" / "run.json").read_text())
    chosen = {key: manifest[key] for key in ("layout", "attention", "attention_tried")}
    assert chosen == {"layout": "shared_prefix", "attention": "sdpa", "attention_tried": {}}
    assert manifest["head_chunk_size"] > 0
    stop_after(straight, 3, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003"
    identity = read_state(checkpoint)["identity"]
    assert identity | {"layout": "shared_prefix", "attention": "sdpa"} == identity
    edit_state(checkpoint, identity=identity | {"attention": "flex"})
    for options in ({}, {"resume": str(checkpoint), "output_dir": tmp_path / "branch"}):
        with pytest.raises(ModelError, match=r"is 'flex' .*runs on CUDA GPUs only"):
            train(settings(straight, **({"output_dir": tmp_path / "run"} | options)))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(straight, step):
    """Steps 1, 2: inside the first epoch; 3: between the two; 4, 5: inside the second."""
    target = straight / f"stopped-{step}"
    stop_after(straight, step, target)
    train(settings(straight, output_dir=target))
    assert_same_run(straight / "run", target)


def test_what_a_loss_keeps_between_batches_is_saved(tmp_path):
    """beta_dpo's running mean; without it the run goes on to other numbers."""
    options = {"loss_type": "beta_dpo", "logging_steps": 1}
    train(settings(tmp_path, **options))
    for name, runs_alike in (("kept", True), ("lost", False)):
        target = tmp_path / name
        stop_after(tmp_path, 4, target)
        checkpoint = target / "checkpoints" / "step-00000004"
        assert abs(read_state(checkpoint)["running"][0]) > 1e-4
        if not runs_alike:
            edit_state(checkpoint, running=None)
        train(settings(tmp_path, output_dir=target, **options))
        assert (read_metrics(tmp_path / "run") == read_metrics(target)) == runs_alike


def test_every_step_is_logged_once(straight):
    assert [line["step"] for line in read_metrics(straight / "run")] == [2, 4, 6]


def test_resume_goes_on_with_a_longer_run(straight):
    """Steps may be added on resume; the first steps are those of the run before."""
    target = straight / "longer"
    stop_after(straight, 4, target)
    train(settings(straight, output_dir=target, num_epochs=3.0, lr_scheduler_type="linear"))
    assert read_metrics(target)[:2] == read_metrics(straight / "run")[:2]
    assert read_metrics(target)[-1]["step"] == 9


def test_a_checkpoint_path_branches_into_a_new_folder(straight):
    checkpoint = straight / "run" / "checkpoints" / "step-00000004"
    train(settings(straight, output_dir=straight / "branch", resume=str(checkpoint)))
    assert_same_run(straight / "run", straight / "branch")


def test_a_checkpoint_path_never_rolls_back_a_run(straight):
    target = straight / "rollback"
    stop_after(straight, 4, target)
    early = target / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match=r"later step-00000004.*new --output_dir"):
        train(settings(straight, output_dir=target, resume=str(early)))


def test_a_finished_run_is_left_alone(straight):
    files = sorted(p for p in (straight / "run").rglob("*") if p.is_file())
    before = [(p, p.stat().st_mtime_ns) for p in files]
    result = train(settings(straight))
    assert result.manifest["status"] == "finished"
    assert [(p, p.stat().st_mtime_ns) for p in files] == before


def test_edited_data_is_refused_on_resume(straight, tmp_path):
    stop_after(straight, 2, tmp_path / "run")
    lines = (straight / "pairs.jsonl").read_text().splitlines()
    edited = tmp_path / "pairs.jsonl"
    edited.write_text("\n".join([*lines[:-1], lines[-1].replace("Yes", "Maybe")]) + "\n")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    manifest["config"]["dataset_name"] = str(edited)
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"dataset was .*, now"):
        train(settings(straight, output_dir=tmp_path / "run", dataset_name=edited))


def test_retention_keeps_the_newest(tmp_path):
    train(settings(tmp_path, keep_last_n_checkpoints=2))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_a_damaged_checkpoint_is_named(straight):
    target = straight / "damaged"
    stop_after(straight, 2, target)
    weights = target / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-00000002 is damaged"):
        train(settings(straight, output_dir=target))


def test_dropout_goes_on_with_the_same_random_numbers(tmp_path):
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model(attention_dropout=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    train(settings(tmp_path, disable_dropout=False))
    stop_after(tmp_path, 4, tmp_path / "stopped")
    train(settings(tmp_path, disable_dropout=False, output_dir=tmp_path / "stopped"))
    assert_same_run(tmp_path / "run", tmp_path / "stopped")
