"""Two processes train to the numbers of one: all cases in one launch, which takes longest."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune import ExperimentConfig, train
from tests.distributed.beside_one import TRAIN_ALL, check_equal, runs
from tests.launches import output_of
from tests.pipelines import pipeline_file
from tests.runs import read_metrics, tiny_settings
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.distributed

UNEVEN = {"max_train_samples": 17}
"""21 pairs end in a batch of 5, dealt 3 and 2; 17 in one of 1, which leaves a rank idle."""
LIVE = {"sync_reference": True, "reference_sync_steps": 2, "reference_mixup_alpha": 0.5}
FASTER = {"learning_rate": 3e-4}
SPLIT_OFF = {"eval_dataset": None, "test_size": 3}
CASES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "an idle rank": UNEVEN,
    "what the loss keeps": UNEVEN | {"loss_type": "beta_dpo"},
    "all pairs together": {"loss_type": "aot"},
    "live reference": UNEVEN | LIVE | FASTER,
    "live reference, all pairs together": UNEVEN | LIVE | FASTER | {"loss_type": "aot"},
    "token mean": {"ld_alpha": 0.3, "sft_weight": 0.5, "sft_reduction": "token"},
    "kto": FASTER | {"loss_type": "kto", "dataset_name": "labelled.jsonl"},
    "bco": FASTER | {"loss_type": "bco", "dataset_name": "labelled.jsonl"},
    "samples": FASTER
    | {"eval_kl_samples": 5, "sample_steps": 3, "num_samples": 3, "sample_max_new_tokens": 6},
    "stopped early": FASTER
    | {"eval_steps": 1, "metric_for_best_model": "eval/loss", "checkpointing_steps": 2}
    | {"early_stopping_patience": 3, "early_stopping_threshold": 9.0},
    "sft": FASTER | {"stage": "sft", "dataset_name": "completions.jsonl"} | SPLIT_OFF,
}
COMMON = {"gradient_accumulation_steps": 1, "max_train_steps": 6, "eval_steps": 3}


def listed(root: Path, to: str, size: int) -> list[dict[str, Any]]:
    """Settings of all cases, into the folder `to`, with so many pairs a forward."""
    rows = [
        {
            "prompt": pair["prompt"],
            "completion": pair["rejected" if i % 3 == 0 else "chosen"],
            "label": i % 3 != 0,
        }
        for i, pair in enumerate(make_pairs(17, seed=0))
    ]
    write_jsonl(root / "labelled.jsonl", rows)
    said = [{k: row[k] for k in ("prompt", "completion")} for row in rows]
    write_jsonl(root / "completions.jsonl", said)
    cases = {
        name: {**COMMON, **case, "per_device_train_batch_size": size}
        for name, case in CASES.items()
    }
    for case in cases.values():
        if "dataset_name" in case:
            case["dataset_name"] = root / case["dataset_name"]
    return runs(root, cases, to)


def with_dropout(root: Path) -> list[dict[str, Any]]:
    """A run on shares of different lengths, and the same stopped after two steps."""
    tiny_model(attention_dropout=0.3).save_pretrained(root / "dropout" / "model")
    tiny_tokenizer().save_pretrained(root / "dropout" / "model")
    options = {"disable_dropout": False, "gradient_accumulation_steps": 1, "loss_type": "simpo"}
    options |= {"checkpointing_steps": 2, "num_epochs": None, "max_train_steps": 4}
    straight = tiny_settings(root / "dropout", **options)
    stopped = straight | {"output_dir": str(root / "dropout" / "stopped")}
    return [straight, stopped | {"cut": [straight["output_dir"], 2]}]


def with_a_bad_row(root: Path, to: str, size: int) -> dict[str, Any]:
    """A run whose row 3 weighs so much that its gradient exceeds fp32, in steps 2 and 4."""
    rows = make_pairs(21, seed=0)
    rows[3]["weight"] = 1e300
    options: dict[str, Any] = {"gradient_accumulation_steps": 1, "on_nonfinite": "skip_batch"}
    options |= {"per_device_train_batch_size": size, "output_dir": root / to / "a bad row"}
    return tiny_settings(root, dataset_name=write_jsonl(root / "bad.jsonl", rows), **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Holds one/ and two/ with a run a case, and dropout/."""
    root = tmp_path_factory.mktemp("two-ranks")
    for settings in [*listed(root, "one", 8), with_a_bad_row(root, "one", 8)]:
        train(ExperimentConfig(**settings))
    two = [*listed(root, "two", 4), *with_dropout(root), with_a_bad_row(root, "two", 4)]
    (root / "list.json").write_text(json.dumps(two))
    pipeline_file(root, lora=True)
    output_of(2, TRAIN_ALL, root / "list.json", Path(__file__).with_name("run_pipeline.py"))
    return root


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one(root, name):
    check_equal(root / "one" / name, root / "two" / name)


def test_two_ranks_sample_what_one_does(root):
    one, two = (root / name / "samples" for name in ("one", "two"))
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    assert len((two / "samples.jsonl").read_text().splitlines()) == 6
    assert abs(read_metrics(two)[-1]["eval/kl/forward"]) > 1e-3


def test_two_ranks_stop_early_together(root):
    for name in ("one", "two"):
        manifest = json.loads((root / name / "stopped early" / "run.json").read_text())
        assert (manifest["status"], manifest["final_step"]) == ("finished", 4)


def test_two_ranks_skip_the_same_batch(root):
    """The bad row is on one rank only; both leave the update out."""
    one, two = (root / name / "a bad row" for name in ("one", "two"))
    skipped = [json.loads((run / "run.json").read_text())["skipped_batches"] for run in (one, two)]
    assert skipped[0] == skipped[1]
    for expected, got in zip(read_metrics(one), read_metrics(two), strict=True):
        assert ("loss" in expected) == ("loss" in got) == (expected["step"] not in (2, 4))
        if "loss" in expected:
            assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_two_ranks_run_a_pipeline(root):
    """Train and evaluate together; the first merges."""
    for stage in ("sft", "dpo"):
        manifest = json.loads((root / "chain" / stage / "run.json").read_text())
        assert (manifest["status"], manifest["world_size"]) == ("finished", 2)
    assert read_metrics(root / "chain" / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    results = json.loads((root / "chain" / "evaluate" / "results.json").read_text())
    assert results["total"]["num_pairs"] == 5
    assert results["models"] == {"model": str(root / "chain" / "merge" / "model")}


def test_each_rank_goes_on_with_its_own_random_numbers(root):
    """The ranks' generators part ways."""
    run, stopped = root / "dropout" / "run", root / "dropout" / "stopped"
    states = load_file(run / "checkpoints" / "step-00000002" / "rng.safetensors")
    assert not torch.equal(states["0/torch"], states["1/torch"])
    assert read_metrics(stopped) == read_metrics(run)
    final = ["final", "model.safetensors"]
    assert stopped.joinpath(*final).read_bytes() == run.joinpath(*final).read_bytes()
    for name in ("model", "optimizer", "rng"):
        path = Path("checkpoints") / "step-00000004" / f"{name}.safetensors"
        assert (stopped / path).read_bytes() == (run / path).read_bytes()
