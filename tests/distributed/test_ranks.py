"""Two ranks, as if on two hosts: shared work with the bytes of one, and failures that all end with.

A rank's working directory stands for its host: options name relative paths, which each sees its own
way.
"""

import json
import shutil
import time
from pathlib import Path

import pytest

from preftune import ExperimentConfig
from preftune.config.score import ScoreConfig
from preftune.recipes.cache import build
from preftune.recipes.score import score
from tests.launches import torchrun
from tests.runs import arguments, read_metrics, tiny_model_folder, tiny_settings
from tests.tiny import make_pairs, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed

TWO_WORK = """
import json, os, sys
from pathlib import Path
from preftune import ExperimentConfig
from preftune.config.score import ScoreConfig
from preftune.distributed.runtime import leave_process_group
from preftune.recipes.cache import build
from preftune.recipes.score import score

to_build, to_score = json.loads(sys.argv[2])
said = build(ExperimentConfig(**to_build))
summary = score(ScoreConfig(**to_score))
said = json.dumps([said, str(summary)])
Path(sys.argv[1], os.environ["LOCAL_RANK"]).write_text(said)
leave_process_group()
"""


def store_files(cache: Path) -> dict[str, bytes]:
    """What a pass wrote, by name."""
    return {
        path.name: path.read_bytes()
        for path in sorted(cache.glob("reference/*/*"))
        if path.suffix in (".safetensors", ".plan")
    }


@pytest.mark.slow
def test_the_store_and_the_scores_of_two_ranks_are_the_bytes_of_one(tmp_path):
    answers = (80, 120)
    tiny = tiny_settings(tmp_path)
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(260, completion_words=answers))
    kept = ("model_name_or_path", "dataset_name", "mixed_precision", "progress")
    other = tiny_model_folder(tmp_path / "other")
    tiny_model(seed=3).save_pretrained(other)
    third = tiny_model_folder(tmp_path / "third")
    tiny_model(seed=4).save_pretrained(third)
    scored = {key: tiny[key] for key in kept}
    scored |= {"reference_model_name_or_path": str(other), "per_device_eval_batch_size": 3}
    scored |= {"kl_samples": 3, "kl_max_new_tokens": 4, "other_models": [str(third)]}

    def options(name: str) -> tuple[dict, dict]:
        place = {"cache_dir": str(tmp_path / name)}
        files = {"output": f"{name}.parquet", "summary": f"{name}.json", "lists": f"{name}.jsonl"}
        paths = {key: str(tmp_path / file) for key, file in files.items()}
        return tiny | place, scored | place | paths

    to_build, to_score = options("one")
    said = build(ExperimentConfig(**to_build))
    summary = str(score(ScoreConfig(**to_score)))
    result = torchrun(2, "-c", TWO_WORK, str(tmp_path), json.dumps(options("two")))
    assert result.returncode == 0, result.stderr
    one, two = store_files(tmp_path / "one"), store_files(tmp_path / "two")
    assert len(one) == 3  # two shards and the plan
    assert one == two
    for ending in ("parquet", "json", "jsonl"):
        ours, theirs = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
        assert ours.read_bytes() == theirs.read_bytes()
    expected = [text.replace(f"{tmp_path}/one", f"{tmp_path}/two") for text in (said, summary)]
    for rank in ("0", "1"):
        assert json.loads((tmp_path / rank).read_text()) == expected


FAILURES = """
import json, os, resource, sys, time
from pathlib import Path
import preftune
from preftune import ExperimentConfig, train
from preftune.distributed.runtime import leave_process_group
from preftune.errors import PreftuneError
from preftune.reference.store import ReferenceStore

rank = int(os.environ["LOCAL_RANK"])
os.chdir(Path(sys.argv[1]) / f"host{rank}")
version, told = preftune.__version__, {}
write_copy, no_limit = ReferenceStore.write_copy, (resource.RLIM_INFINITY,) * 2

def full(self, name, content):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    write_copy(self, name, content)

for name, cases in json.loads(sys.argv[2]).items():
    options, others = cases
    preftune.__version__ = "9.9" if name == "version" and rank else version
    ReferenceStore.write_copy = full if name == "disk" and rank else write_copy
    began = time.monotonic()
    try:
        train(ExperimentConfig(**options, **(others if rank else {})))
        told[name] = None
    except PreftuneError as error:
        told[name] = [type(error).__name__, str(error), error.rank, time.monotonic() - began]
    resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
Path("told.json").write_text(json.dumps(told))
leave_process_group()
"""


def two_hosts(root: Path) -> dict[str, object]:
    """Folders host0 and host1 with the same files, but for those that a test asks for."""
    settings = tiny_settings(root)
    for host in ("host0", "host1"):
        shutil.copytree(root / "model", root / host / "model")
        shutil.copytree(root / "model", root / host / "other_model")
        for name in ("pairs", "other", "missing"):
            shutil.copy(root / "pairs.jsonl", root / host / f"{name}.jsonl")
    tiny_model(seed=3).save_pretrained(root / "host1" / "other_model")
    write_jsonl(root / "host1" / "other.jsonl", make_pairs(21, seed=5))
    (root / "host1" / "missing.jsonl").unlink()
    settings |= {"model_name_or_path": "model", "dataset_name": "pairs.jsonl"}
    settings |= {"cache_dir": "cache", "dataset_cache_mode": "off", "num_epochs": 1.0}
    return settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.mark.slow
def test_what_one_host_lacks_ends_both_with_the_same_words(tmp_path):
    base = two_hosts(tmp_path)
    changes = {
        "version": {},
        "options": {},
        "data": {"dataset_name": "other.jsonl"},
        "missing": {"dataset_name": "missing.jsonl"},
        "model": {"model_name_or_path": "other_model"},
        "output": {"output_dir": "run", "checkpointing_steps": 1},
        "disk": {"cache_dir": "small"},
        "good": {"output_dir": "run"},  # without checkpoints, a host's own folder will do
    }
    cases = {name: [base | change, {}] for name, change in changes.items()}
    cases["options"] = [
        {key: value for key, value in base.items() if key != "learning_rate"},
        {"learning_rate": 0.5},
    ]
    result = torchrun(2, "-c", FAILURES, str(tmp_path), json.dumps(cases))
    assert result.returncode == 0, result.stderr
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    first, second = (json.loads((host / "told.json").read_text()) for host in hosts)
    assert first.pop("good") is second.pop("good") is None
    for name, (kind, text, rank, seconds) in first.items():
        assert second[name][:3] == [kind, text, 1], name
        assert rank == 0, name
        assert seconds < 30, name
        assert not (tmp_path / "run" / "run.json").exists(), name
    kinds = {name: kind for name, (kind, *_) in first.items()}
    assert kinds == {
        "version": "ConfigError",
        "options": "ConfigError",
        "data": "ConfigError",
        "missing": "DataError",
        "model": "ConfigError",
        "output": "CheckpointError",
        "disk": "CacheError",
    }
    texts = {name: text for name, (_, text, *_) in first.items()}
    assert texts["version"].startswith("the version of preftune differs between ranks: ")
    assert "; 9.9 on rank 1 (host " in texts["version"]
    assert texts["version"].endswith("; install the same on all hosts")
    assert texts["options"].startswith("learning_rate differs between ranks: ")
    assert texts["data"].startswith("the data to train on (other.jsonl) differs between ranks: ")
    assert texts["missing"].startswith("on rank 1 of 2 (host ")
    assert "missing.jsonl" in texts["missing"]
    assert texts["model"].startswith("other_model: weights differs between ranks: ")
    assert "is not seen by rank 1 (host " in texts["output"]
    assert texts["disk"].startswith("on rank 1 of 2 (host ")
    assert "cannot write reference log-probs to " in texts["disk"]
    # The run that followed has left the reference's values on both hosts, and all else on one.
    ours, theirs = (store_files(host / "cache") for host in hosts)
    assert ours == theirs
    assert len(ours) >= 2
    assert len(read_metrics(hosts[0] / "run")) == 3
    assert list((hosts[1] / "run").iterdir()) == []


COMMAND = """
import os, sys
from pathlib import Path

rank = int(os.environ["LOCAL_RANK"])
os.chdir(Path(sys.argv[1]) / f"host{rank}")
if sys.argv[2] == "in a step" and rank:
    from preftune.distributed.engine import TorchEngine

    backward, calls = TorchEngine.backward, []

    def fail(self, loss):
        calls.append(loss)
        if len(calls) == 3:  # the first is tried before the first step
            raise MemoryError("no more")
        backward(self, loss)

    TorchEngine.backward = fail
from preftune.cli.main import main

code = main(sys.argv[3:])
Path("code").write_text(str(code))
sys.exit(code)
"""


def test_the_command_says_it_once_and_all_ranks_exit_alike(tmp_path):
    """The config file is on one host only."""
    config = ExperimentConfig(**two_hosts(tmp_path))
    (tmp_path / "host0" / "run.yaml").write_text(config.to_yaml())
    began = time.monotonic()
    result = torchrun(2, "-c", COMMAND, str(tmp_path), "", "train", "run.yaml")
    assert time.monotonic() - began < 60
    assert result.returncode != 0
    assert [(tmp_path / host / "code").read_text() for host in ("host0", "host1")] == ["2", "2"]
    assert result.stderr.count("preftune: error: ") == 1
    assert "preftune: error: on rank 1 of 2 (host " in result.stderr
    assert "run.yaml" in result.stderr
    assert result.stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow
def test_a_rank_that_fails_within_a_step_ends_the_others_in_bounded_time(tmp_path):
    settings = two_hosts(tmp_path)
    began = time.monotonic()
    result = torchrun(2, "-c", COMMAND, str(tmp_path), "in a step", "train", *arguments(settings))
    assert time.monotonic() - began < 60
    assert result.returncode != 0
    assert "preftune: error: out of memory: " in result.stderr
    assert "in step 2" in result.stderr
    assert (tmp_path / "host1" / "code").read_text() == "2"
