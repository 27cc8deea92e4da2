"""The job beaker: its specification by beaker-py's own types; nothing is submitted."""

import importlib

import pytest
import yaml

from preftune.config.evaluate import EvaluateConfig
from preftune.errors import ConfigError
from preftune.evaluation.jobs import beaker as job
from preftune.recipes.evaluate import evaluate
from tests.runs import tiny_config, tiny_model_folder

OPTIONS = {
    "eval_jobs": ["beaker"],
    "eval_tasks": ["arc_easy", "ifeval"],
    "beaker_image": "docker:ghcr.io/org/preftune:1",
    "beaker_budget": "org/oe",
    "beaker_cluster": ["org/jupiter", "org/ceres"],
    "beaker_priority": "high",
    "beaker_gpus": 2,
    "beaker_hf_secret": "my_HF_TOKEN",
}


@pytest.fixture
def beaker():
    """beaker-py, where it is installed and can be imported."""
    return pytest.importorskip("beaker", exc_type=ImportError)


def test_the_specification(beaker):
    spec = job.experiment(["org/model", "--eval_jobs", "lm_eval"], EvaluateConfig(**OPTIONS))
    held = yaml.safe_load(job.as_yaml(spec))
    assert beaker.BeakerExperimentSpec.from_json(held) == spec
    assert held["budget"] == "org/oe"
    (task,) = held["tasks"]
    assert task["image"] == {"docker": "ghcr.io/org/preftune:1"}
    assert task["command"] == ["preftune", "evaluate", "org/model", "--eval_jobs", "lm_eval"]
    assert task["constraints"] == {"cluster": ["org/jupiter", "org/ceres"]}
    assert task["context"] == {"priority": "high"}
    assert task["resources"] == {"gpuCount": 2}
    assert task["result"] == {"path": "/results"}
    assert task["envVars"] == [{"name": "HF_TOKEN", "secret": "my_HF_TOKEN"}]
    plain = EvaluateConfig(eval_jobs=["beaker"], eval_tasks=["a"], beaker_image="me/image")
    held = yaml.safe_load(job.as_yaml(job.experiment(["m"], plain)))
    assert held["tasks"][0]["image"] == {"beaker": "me/image"}
    assert held["tasks"][0]["resources"] == {"gpuCount": 1}


def test_a_dry_run_needs_no_credentials_and_a_submission_does(beaker, tmp_path, monkeypatch):
    monkeypatch.delenv("BEAKER_TOKEN", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = importlib.import_module("beaker.config").Config
    monkeypatch.setattr(settings, "find_config", lambda: None)
    model = str(tiny_model_folder(tmp_path / "model"))
    options = OPTIONS | {"hub_repo_id": "org/model", "output": str(tmp_path / "out")}
    text = evaluate(EvaluateConfig(**options, dry_run=True), model)
    command = yaml.safe_load(text)["tasks"][0]["command"]
    assert command[:4] == ["preftune", "evaluate", "org/model", "--eval_jobs"]
    assert command[-4:] == ["arc_easy", "ifeval", "--output", "/results"]
    with pytest.raises(ConfigError, match="set BEAKER_TOKEN"):
        evaluate(EvaluateConfig(**options), model)
    del options["hub_repo_id"]
    with pytest.raises(ConfigError, match="give --hub_repo_id"):
        evaluate(EvaluateConfig(**options, dry_run=True), model)


def test_it_reads_the_hub(tmp_path):
    """Training with it pushes; lm_eval reads final/, and needs no hub."""
    with pytest.raises(ConfigError, match="reads the model from the Hub: set push_to_hub"):
        tiny_config(tmp_path, **OPTIONS)
    assert tiny_config(tmp_path, eval_jobs=["lm_eval"], eval_tasks=["a"]).eval_jobs == ["lm_eval"]


def test_it_is_an_extra(monkeypatch):
    monkeypatch.setattr(job, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'preftune\[beaker\]'"):
        job.check_beaker(submits=False)
