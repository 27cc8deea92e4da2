"""Losses and gradients that break: the run stops in time, or leaves the batch out and goes on."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from preftune import train
from preftune.cli.main import main
from preftune.errors import CacheError, ConfigError, TrainingDiverged
from tests.runs import arguments, read_metrics, tiny_config, tiny_settings
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

BAD = 3
"""Row, counted from 0, that breaks its batch: of steps 2 and 4 of 6, and none that the check before
the first step looks at."""
EVERY_STEP = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None}
SKIP = EVERY_STEP | {"on_nonfinite": "skip_batch"}


def overflowing(root, weight=1e300):
    """Pairs of which one weighs so much that its gradient exceeds fp32, and its loss does not."""
    rows = make_pairs(21, seed=0)
    rows[BAD]["weight"] = weight
    return write_jsonl(root / f"weight-{weight}.jsonl", rows)


def tensors(run, step, name="model"):
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def bad_steps(root):
    """The steps that the row at fault is in, from run.json of a run that skips them."""
    return [entry["step"] for entry in manifest_of(root / "run")["skipped_batches"]]


def manifest_of(run):
    return json.loads((run / "run.json").read_text())


def test_stop_saves_the_state_before_the_bad_update_and_names_step_and_rows(tmp_path, capsys):
    settings = tiny_settings(tmp_path, dataset_name=overflowing(tmp_path), **EVERY_STEP)
    assert main(["train", *arguments(settings)]) == 3
    error = capsys.readouterr().err
    assert "the loss or gradient of step" in error
    assert "every row's loss is finite, so a gradient is not; the largest loss is 6.93" in error
    assert f"of weight-1e+300.jsonl:{BAD + 1}. Its rows: " in error
    saved = max(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"the loss or gradient of step {saved + 1} is not finite" in error
    assert manifest_of(tmp_path / "run")["status"] == "diverged"
    # The same pairs without the weight: until the bad step the same run.
    sound = tiny_config(
        tmp_path,
        dataset_name=overflowing(tmp_path, 1.0),
        output_dir=tmp_path / "sound",
        **EVERY_STEP,
    )
    train(sound)
    assert_equal(tensors(tmp_path / "run", saved), tensors(tmp_path / "sound", saved))
    assert_equal(
        tensors(tmp_path / "run", saved, "optimizer"),
        tensors(tmp_path / "sound", saved, "optimizer"),
    )


def test_a_row_whose_own_loss_is_no_number_is_named(tmp_path):
    """A model that is broken for one token, which one answer holds."""
    rows = make_pairs(21, seed=0)
    rows[BAD]["rejected"][0]["content"] += " Ω"
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Ω")["input_ids"][-1]] = math.inf
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "one.jsonl", rows)
    config = tiny_config(tmp_path, dataset_name=data, loss_type="simpo", forward_layout="separate")
    with pytest.raises(TrainingDiverged, match=rf"alone, the loss of one.jsonl:{BAD + 1} \(nan\)"):
        train(config)
    # Where a reference is scored first, it is told before training.
    with pytest.raises(CacheError, match=rf"gives 1 of 21 rows .* \(one.jsonl:{BAD + 1}\)"):
        train(tiny_config(tmp_path, dataset_name=data, output_dir=tmp_path / "dpo"))


def test_a_diverging_loss_stops_before_it_spoils_the_weights(tmp_path):
    """Too high a learning rate: the weights overflow by themselves."""
    options = {"optimizer": "sgd", "learning_rate": 1e30, "max_grad_norm": 0}
    options |= {"loss_type": "robust", "label_smoothing": 0.1, "warmup_ratio": 0.0}
    with pytest.raises(TrainingDiverged, match=r"lower learning_rate \(1e\+30\)"):
        train(tiny_config(tmp_path, **EVERY_STEP, **options))
    last = max(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert all(bool(x.isfinite().all()) for x in tensors(tmp_path / "run", last).values())


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "beta_dpo"},
        {"sync_reference": True, "reference_sync_steps": 1, "reference_mixup_alpha": 0.5},
    ],
    ids=["beta_dpo", "sync"],
)
def test_a_skipped_batch_changes_nothing_and_later_ones_train_on(tmp_path, options):
    # Without a warm-up, so that each step moves the policy off the reference, not by rounding.
    data = overflowing(tmp_path)
    config = tiny_config(tmp_path, dataset_name=data, warmup_ratio=0.0, **SKIP, **options)
    result = train(config)
    assert result.manifest["status"] == "finished"
    skipped = bad_steps(tmp_path)
    assert skipped == [2, 4]  # once an epoch
    for entry in manifest_of(tmp_path / "run")["skipped_batches"]:
        assert f"weight-1e+300.jsonl:{BAD + 1}" in entry["rows"]
        assert len(entry["rows"]) == 8
    states = [
        json.loads((tmp_path / f"run/checkpoints/step-{step:08d}/state.json").read_text())
        for step in range(1, 7)
    ]
    files = ["model", "optimizer", *(["reference"] if "sync_reference" in options else [])]
    for step in range(2, 7):
        for name in files:
            before, after = (tensors(tmp_path / "run", at, name) for at in (step - 1, step))
            same = all(torch.equal(before[key], after[key]) for key in before)
            assert same == (step in skipped), (step, name)
        if options.get("loss_type") == "beta_dpo":
            same = states[step - 2]["running"] == states[step - 1]["running"]
            assert same == (step in skipped)
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_batches"] for line in lines] == [
        sum(step <= line["step"] for step in skipped) for line in lines
    ]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
        assert ("loss" in line) == (line["step"] not in skipped)


def test_a_batch_that_is_skipped_is_not_in_the_means_of_its_window(tmp_path):
    data = overflowing(tmp_path)
    train(tiny_config(tmp_path, dataset_name=data, **SKIP))
    whole = tiny_config(
        tmp_path, dataset_name=data, output_dir=tmp_path / "b", **SKIP | {"logging_steps": 3}
    )
    train(whole)
    lines = [line for line in read_metrics(tmp_path / "run") if line["step"] <= 3]
    (first, _) = read_metrics(tmp_path / "b")
    mean = sum(x["grad_norm"] for x in lines if "loss" in x) / sum("loss" in x for x in lines)
    assert first["grad_norm"] == pytest.approx(mean, rel=1e-12)
    assert first["skipped_batches"] == 1


def test_above_the_limit_the_run_stops_and_a_higher_one_goes_on(tmp_path, capsys):
    data = overflowing(tmp_path)
    settings = tiny_settings(tmp_path, dataset_name=data, **SKIP, max_skipped_batches=1)
    settings["progress"] = "plain"
    assert main(["train", *arguments(settings)]) == 3
    told = capsys.readouterr().err
    assert "after 1 skipped ones (max_skipped_batches)" in told
    assert "was skipped: its loss or gradient is not finite (its rows: " in told
    assert main(["train", *arguments(settings | {"max_skipped_batches": 2})]) == 0
    train(tiny_config(tmp_path, dataset_name=data, output_dir=tmp_path / "straight", **SKIP))
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")
    assert_equal(
        load_file(tmp_path / "run" / "final" / "model.safetensors"),
        load_file(tmp_path / "straight" / "final" / "model.safetensors"),
    )


def test_after_a_stop_the_run_may_go_on_by_skipping(tmp_path):
    data = overflowing(tmp_path)
    with pytest.raises(TrainingDiverged):
        train(tiny_config(tmp_path, dataset_name=data, **EVERY_STEP))
    result = train(tiny_config(tmp_path, dataset_name=data, **SKIP))
    assert len(result.manifest["skipped_batches"]) == 2


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_a_run_stopped_between_two_skipped_batches_goes_on_to_the_same_bits(
    tmp_path, logging_steps
):
    options = {"dataset_name": overflowing(tmp_path), "logging_steps": logging_steps}
    options |= {"loss_type": "beta_dpo"} | SKIP
    train(tiny_config(tmp_path, **options))
    for stopped_after in (1, 2, 3):
        target = tmp_path / f"stopped-{stopped_after}"
        shutil.copytree(tmp_path / "run", target)
        shutil.rmtree(target / "final")
        for path in (target / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > stopped_after:
                shutil.rmtree(path)
        (target / "run.json").write_text(
            json.dumps(manifest_of(target) | {"status": "running", "skipped_batches": []})
        )
        train(tiny_config(tmp_path, output_dir=target, **options))
        assert read_metrics(target) == read_metrics(tmp_path / "run")
        assert (
            manifest_of(target)["skipped_batches"]
            == (manifest_of(tmp_path / "run")["skipped_batches"])
        )
        final = "final/model.safetensors"
        assert_equal(load_file(target / final), load_file(tmp_path / "run" / final))


def test_a_limit_without_skipping_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_skipped_batches is 3; on_nonfinite is 'stop'"):
        tiny_config(tmp_path, max_skipped_batches=3)
    with pytest.raises(ConfigError, match="max_skipped_batches is 0; it must be 1 or more"):
        tiny_config(tmp_path, on_nonfinite="skip_batch", max_skipped_batches=0)


def test_warnings_are_said_and_kept_over_a_resume(tmp_path, capsys):
    options = {"max_train_steps": 24, "num_epochs": None, "learning_rate": 1e-12}
    options |= {"optimizer": "sgd", "checkpointing_steps": 15, "progress": "plain"}
    train(tiny_config(tmp_path, **options))
    assert "warning after step 20: the loss is where it began" in capsys.readouterr().err
    (warned,) = manifest_of(tmp_path / "run")["warnings"]
    assert warned["kind"] == "not_learning"
    assert warned["step"] == 20
    assert warned["value"] < warned["threshold"] == 1e-3
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000024")
    (tmp_path / "run" / "run.json").write_text(
        json.dumps(manifest_of(tmp_path / "run") | {"status": "running", "warnings": []})
    )
    train(tiny_config(tmp_path, **options))
    assert manifest_of(tmp_path / "run")["warnings"] == [warned]
