"""`reference_model_name_or_path`: a reference that is not the policy before its first step."""

import gc
import json
import shutil
from pathlib import Path

import pytest

from preftune import ExperimentConfig, train
from preftune.config.score import ScoreConfig
from preftune.errors import CheckpointError
from preftune.model.forward import PolicyModel
from preftune.recipes import train as training_recipe
from preftune.recipes.score import score
from tests.runs import read_metrics, tiny_config
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another model with the same tokens."""
    folder = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def with_reference(root: Path, other: Path, **options) -> ExperimentConfig:
    return tiny_config(root, reference_model_name_or_path=other, **options)


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_rewards_are_those_of_score(tmp_path, other, capsys, layout):
    options = {"per_device_train_batch_size": 21, "gradient_accumulation_steps": 1}
    options |= {"forward_layout": layout, "progress": "plain"}
    result = train(with_reference(tmp_path, other, **options))
    said = capsys.readouterr().err
    assert f"the reference is {other}: policy and reference are not compared" in said
    before_step_1 = read_metrics(result.folder.root)[0]
    scored = score(
        ScoreConfig(
            model_name_or_path=str(tmp_path / "model"),
            reference_model_name_or_path=str(other),
            dataset_name=str(tmp_path / "pairs.jsonl"),
            mixed_precision="fp32",
            progress="none",
        )
    )
    margin = scored.summary.against_reference.rewards.margin
    assert before_step_1["rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert abs(margin) > 0.01
    about = result.manifest["reference_model"]
    assert about == {"name": str(other), "commit": None, "weights": about["weights"]}
    assert about["weights"] != result.manifest["model"]["weights"]


def test_the_store_belongs_to_the_model_not_to_its_role(tmp_path, other):
    """What a run of the other model has scored is there for a run that measures against it."""
    as_policy = tiny_config(tmp_path, model_name_or_path=other, output_dir=tmp_path / "a")
    assert train(as_policy).manifest["reference"]["reference"]["computed"] == 42
    manifest = train(with_reference(tmp_path, other, test_size=4)).manifest
    assert manifest["reference"]["reference"] == {"computed": 0, "reused": 34}
    assert manifest["reference"]["reference (held out)"] == {"computed": 0, "reused": 8}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_its_memory_is_free_before_training(tmp_path, other, monkeypatch, precision):
    loaded = []
    open_reference = training_recipe.open_reference

    def counted(*args, **kwargs):
        reference = open_reference(*args, **kwargs)
        loaded.append(models())
        return reference

    def models() -> int:
        return sum(type(thing) is PolicyModel for thing in gc.get_objects())

    def at_start(*args, **kwargs):
        loaded.append(models())
        raise KeyboardInterrupt

    gc.collect()
    others = models()
    monkeypatch.setattr(training_recipe, "open_reference", counted)
    monkeypatch.setattr(training_recipe.TrainState, "at_start", at_start)
    with pytest.raises(KeyboardInterrupt):
        train(with_reference(tmp_path, other, mixed_precision=precision))
    assert [number - others for number in loaded] == [2, 1]


def test_a_run_goes_on_with_its_own_reference_alone(tmp_path, other):
    straight = train(with_reference(tmp_path, other, output_dir=tmp_path / "b"))
    config = with_reference(tmp_path, other, checkpointing_steps=2)
    run = train(config).folder
    manifest = json.loads(run.manifest.read_text())
    run.manifest.write_text(json.dumps(manifest | {"status": "interrupted"}))
    shutil.rmtree(run.checkpoint(6))
    with pytest.raises(CheckpointError, match="reference_model_name_or_path was"):
        train(tiny_config(tmp_path, checkpointing_steps=2))
    # Other weights under the same name are another reference.
    shutil.copytree(other, tmp_path / "kept")
    tiny_model(seed=2).save_pretrained(other)
    with pytest.raises(CheckpointError, match="reference namespace was"):
        train(config)
    shutil.rmtree(other)
    shutil.copytree(tmp_path / "kept", other)
    assert train(config).manifest["status"] == "finished"
    assert read_metrics(run.root) == read_metrics(straight.folder.root)
