"""Optimizers on two ranks take the steps of one, whole and cut, and go on from one another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from preftune import ExperimentConfig, train
from tests.distributed.beside_one import TRAIN_ALL, runs
from tests.launches import output_of
from tests.runs import pretend_unfinished, read_metrics
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROUNDED = {"dtype": "bfloat16", "stochastic_rounding": True}
KINDS: dict[str, dict[str, Any]] = {
    "8bit": {"optimizer": "adamw_torch_8bit"},
    "4bit": {"optimizer": "adamw_torch_4bit"},
    "rounded": {"optimizer": "adamw", **ROUNDED},
    "bnb": {"optimizer": "adamw_8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "muon": {"optimizer": "muon"},
}
CUT = ("8bit", "4bit", "rounded")
BASE = {"max_train_samples": 17, "max_train_steps": 6, "eval_steps": 6, "checkpointing_steps": 3}
BASE |= {"learning_rate": 1e-4}
ALONE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
FSDP = {"fsdp": "full_shard", "gradient_checkpointing": "selective"}
LOSSES = ("loss", "logps/chosen", "logps/rejected", "grad_norm", "eval/loss")


def check_near(one: Path, other: Path, tolerance: float) -> None:
    """A last bit of a gradient may give a moment another code, and a weight another neighbour."""
    lines = read_metrics(one), read_metrics(other)
    assert len(lines[0]) == len(lines[1]) == 6
    for expected, got in zip(*lines, strict=True):
        for key in LOSSES:
            if key in expected:
                assert got[key] == pytest.approx(expected[key], rel=tolerance), (other, key)


def test_two_ranks_take_the_steps_of_one_and_go_on(tmp_path):
    """DDP for all of them; FSDP2 for those whose rows stand alone, also from one rank's state."""
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for settings in runs(tmp_path, {k: {**BASE, **ALONE, **v} for k, v in KINDS.items()}, "one"):
        train(ExperimentConfig(**settings))
    cases = {f"ddp-{kind}": {**BASE, **TWO, **options} for kind, options in KINDS.items()}
    cut = {f"fsdp-{kind}": {**BASE, **TWO, **KINDS[kind], **FSDP} for kind in CUT}
    listed = runs(tmp_path, cases | cut, "many")
    onwards = {f"{name}-on": options for name, options in cut.items()}
    resumed = runs(tmp_path, onwards, "on")
    for settings, kind in zip(resumed, CUT, strict=True):
        settings["cut"] = [str(tmp_path / "one" / kind), 3]
    (tmp_path / "list.json").write_text(json.dumps(listed + resumed))
    output_of(2, TRAIN_ALL, tmp_path / "list.json")
    for run in [*(tmp_path / "many").iterdir(), *(tmp_path / "on").iterdir()]:
        kind = run.name.split("-")[1]
        check_near(tmp_path / "one" / kind, run, 2e-2 if kind == "rounded" else 1e-3)
    # Back on one: what two have written in halves of rows.
    (settings,) = runs(tmp_path, {"8bit": {**BASE, **ALONE, **KINDS["8bit"]}}, "back")
    shutil.copytree(tmp_path / "many" / "fsdp-8bit", settings["output_dir"])
    pretend_unfinished(Path(settings["output_dir"]), 3)
    train(ExperimentConfig(**settings))
    check_near(tmp_path / "one" / "8bit", tmp_path / "back" / "8bit", 1e-3)
    parts = tmp_path / "many" / "fsdp-8bit" / "checkpoints" / "step-00000006"
    with safe_open(parts / "optimizer-00001-of-00002.safetensors", "pt") as file:
        name = "model.layers.0.mlp.up_proj.weight"
        shapes = [file.get_slice(f"exp_avg.{x}/{name}").get_shape() for x in ("codes", "scales")]
    assert shapes == [[64, 64], [64, 1]]
