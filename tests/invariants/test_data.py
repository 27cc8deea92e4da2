"""Data of whole runs: mixes, held-out prompts, named evaluation sets, preparation, the Hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preftune import ExperimentConfig, train
from preftune.cli.main import main
from preftune.model.forward import PolicyModel
from preftune.recipes.pairs import Pairs, load_experiment_pairs, prepare_tokenizer
from preftune.tracking.progress import ProgressDisplay
from tests.runs import arguments, read_metrics, tiny_config, tiny_model_folder, tiny_settings
from tests.tiny import make_pairs, write_jsonl

# ---------------------------------------------------------------- held-out prompts


def sources(root: Path) -> dict[str, dict[str, Any]]:
    """Every way to name training data; prompts occur in several of the files."""
    rows = make_pairs(60, prompts=12)
    a, b = (str(write_jsonl(root / f"{name}.jsonl", rows[i::2])) for i, name in enumerate("ab"))
    (root / "folder").mkdir(exist_ok=True)
    write_jsonl(root / "folder" / "train.jsonl", rows[:30])
    write_jsonl(root / "folder" / "test.jsonl", rows[30:40])
    folder = str(root / "folder")
    return {
        "file": {"dataset_name": a},
        "folder": {"dataset_name": folder},
        "mixer": {"dataset_mixer": {a: 0.6, b: 40}},
        "list": {"dataset_mixer_list": [a, "1.0", b, "5"]},
        "repeated": {"dataset_mixer": {a: 2.5, folder: 1.0}},
    }


def held_out(root: Path) -> dict[str, dict[str, Any]]:
    """Every way to have held-out pairs; the files share prompts with the training data."""
    rows = make_pairs(60, prompts=12)
    shared = str(write_jsonl(root / "shared.jsonl", rows[4:7]))
    other = str(write_jsonl(root / "other.jsonl", make_pairs(5, seed=9)))
    return {
        "part": {"test_size": 0.25},
        "number": {"test_size": 7},
        "name": {"eval_dataset": shared},
        "split": {"eval_dataset": str(root / "folder"), "eval_split": "test"},
        "map": {"eval_dataset": {"shared": shared, "other": other}},
    }


def load(config: ExperimentConfig) -> Pairs:
    return load_experiment_pairs(config, prepare_tokenizer(config), ProgressDisplay("none"))


@pytest.mark.parametrize("how", ["part", "number", "name", "split", "map"])
@pytest.mark.parametrize("source", ["file", "folder", "mixer", "list", "repeated"])
def test_a_held_out_set_shares_no_prompt_with_training(
    tmp_path: Path, source: str, how: str
) -> None:
    data = sources(tmp_path)[source]
    settings = tiny_settings(tmp_path, **held_out(tmp_path)[how])
    del settings["dataset_name"]
    pairs = load(ExperimentConfig(**settings, **data))
    trained = {tuple(e.prompt_ids) for e in pairs.train.examples}
    evaluated = {tuple(e.prompt_ids) for d in pairs.held_out.values() for e in d.examples}
    assert trained
    assert evaluated
    assert not trained & evaluated
    # No pair of what was given is lost but those, counted, whose prompt is evaluated.
    counts = pairs.train.counts
    assert counts.read == counts.kept + counts.not_drawn + sum(counts.dropped.values())


# ---------------------------------------------------------------- whole runs


def test_sources_and_named_evaluation_sets_of_a_run(tmp_path: Path) -> None:
    settings = tiny_settings(
        tmp_path,
        **held_out(tmp_path)["map"],
        **sources(tmp_path)["mixer"],
        dataset_transforms=["swap_sides"],
        report_to=["tensorboard"],
        checkpointing_steps=100,
        num_epochs=1.0,
    )
    del settings["dataset_name"]
    config = ExperimentConfig(**settings)
    manifest = train(config).manifest
    assert [s["drawn"] for s in manifest["data"]["train"]["sources"]] == [18, 40]
    assert [s["amount"] for s in manifest["data"]["train"]["sources"]] == [0.6, 40]
    assert set(manifest["data"]) == {"train", "held_out/shared", "held_out/other"}
    last = read_metrics(tmp_path / "run")[-1]
    for label in ("shared", "other"):
        assert last[f"eval/{label}/rewards/margins"] != 0.0
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    saved = json.loads((checkpoint / "state.json").read_text())["config"]
    assert ExperimentConfig(**saved) == config


def test_a_transform_changes_what_is_trained(tmp_path: Path) -> None:
    plain, swapped = (
        load(tiny_config(tmp_path, dataset_transforms=names)).train.examples
        for names in (None, ["swap_sides"])
    )
    assert swapped[0].completions == plain[0].completions[::-1]


def test_use_cache_reaches_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = PolicyModel.forward

    def counted(self: PolicyModel, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            model = self.model.base_model
            handle = model.register_forward_hook(
                lambda m, a, output: seen.append(output.past_key_values is not None)
            )
            result = forward(self, *args, **kwargs)
            handle.remove()
            return result
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    lines = []
    for use_cache in (False, True):
        seen.clear()
        root = tmp_path / str(use_cache)
        train(tiny_config(root, use_cache=use_cache, max_train_steps=2, num_epochs=None))
        assert seen == [use_cache]
        lines.append(read_metrics(root / "run"))
    assert lines[0] == lines[1]


# ---------------------------------------------------------------- preparation


@pytest.mark.parametrize("form", ["train", "data"])
def test_a_preparation_job_leaves_nothing_to_tokenise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    settings = tiny_settings(tmp_path, test_size=5, progress="plain")
    words = arguments(settings)
    command = ["train", "--cache_dataset_only"] if form == "train" else ["data", "tokenize"]
    assert main([*command, *words]) == 0
    assert str(tmp_path / "cache" / "datasets") in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(["train", *words]) == 0
    assert "tokens from the cache" in capsys.readouterr().err


# ---------------------------------------------------------------- the Hub, offline

SHA = {"old": "a" * 40, "new": "b" * 40}


def hub_repository(cache: Path, kind: str, name: str, commit: str, files: Path) -> None:
    """Lay a commit out as huggingface_hub does, and let `main` stand for it."""
    root = cache / f"{kind}--{name.replace('/', '--')}"
    shutil.copytree(files, root / "snapshots" / commit)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text(commit)


@pytest.mark.slow
def test_a_run_keeps_the_commit_that_its_branch_stood_for(tmp_path: Path) -> None:
    hub, model, data = tmp_path / "hub", tmp_path / "m", tmp_path / "d"
    hub_repository(hub, "models", "org/tiny", SHA["old"], tiny_model_folder(model))
    write_jsonl(data / "train.jsonl", make_pairs(21))
    hub_repository(hub, "datasets", "org/pairs", SHA["old"], data)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "arrow"),
    }

    def run(folder: str) -> tuple[dict[str, Any], str]:
        settings = tiny_settings(tmp_path, checkpointing_steps=2, num_epochs=1.0, progress="plain")
        settings |= {"model_name_or_path": "org/tiny", "dataset_name": "org/pairs"}
        settings |= {"output_dir": str(tmp_path / folder), "model_revision": "main"}
        settings |= {"reference_model_name_or_path": "org/tiny"}
        command = [sys.executable, "-m", "preftune", "train", *arguments(settings)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / folder / "run.json").read_text()), done.stderr

    manifest, _ = run("run")
    assert manifest["model"]["commit"] == SHA["old"]
    assert manifest["reference_model"]["commit"] == SHA["old"]
    assert manifest["data"]["train"]["sources"][0]["revision"] == SHA["old"]
    # The run is interrupted, and the branch moves to other weights meanwhile.
    manifest["status"] = "interrupted"
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    (tmp_path / "other").mkdir()
    shutil.copytree(model, tmp_path / "n")
    (tmp_path / "n" / "config.json").write_text((model / "config.json").read_text() + "\n")
    hub_repository(hub, "models", "org/tiny", SHA["new"], tmp_path / "n")
    resumed, said = run("run")
    assert "going on after step 2" in said
    again, _ = run("again")
    for key in ("model", "reference_model"):
        assert resumed[key]["commit"] == SHA["old"]
        assert again[key]["commit"] == SHA["new"]


def test_the_saved_model_stops_where_its_answers_were_taught_to(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, max_train_steps=1, num_epochs=None)
    folder = train(config).folder.final
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    trained = load(config).train.examples[0].completions[0].ids[-1]
    assert trained in (stops if isinstance(stops, list) else [stops])
