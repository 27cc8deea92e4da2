"""FSDP2 and DeepSpeed ZeRO take the steps of one process, and go on from one another."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune import ExperimentConfig, train
from tests.distributed.beside_one import TRAIN_ALL, check_equal, runs
from tests.launches import output_of
from tests.runs import read_metrics

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
pytestmark = pytest.mark.distributed

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard", "fsdp_reshard_after_forward": False},
    "hybrid": {"fsdp": "hybrid_shard", "fsdp_shard_size": 1, "fsdp_offload_params": True},
    "zero0": {"zero_stage": 0},
    "zero1": {"zero_stage": 1, "offload_optimizer": True},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3, "offload_param": True, "offload_optimizer": True},
}
SHAPES = {
    "4x1": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "1x4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}
"""Of a rank's share of a global batch of 8; with 17 pairs the last one is 1, and a rank idle."""
BASE = {"max_train_samples": 17, "max_train_steps": 10, "eval_steps": 5, "checkpointing_steps": 5}


def launched(root: Path, listed: list[Any], num_processes: int = 2) -> None:
    (root / "list.json").write_text(json.dumps(listed))
    output_of(num_processes, TRAIN_ALL, root / "list.json")


def cases(shape: str) -> dict[str, dict[str, Any]]:
    return {f"{name}-{shape}": {**engine, **SHAPES[shape]} for name, engine in ENGINES.items()}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def test_every_engine_takes_the_steps_of_one_process_and_any_goes_on(tmp_path):
    """Ten steps of 8, 8 and 1 pairs from a policy that is not the reference; other engines."""
    alone = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    (settings,) = runs(tmp_path, {"run": {**BASE, **alone}}, "one")
    train(ExperimentConfig(**settings))
    one = tmp_path / "one" / "run"
    many = cases("4x1") | cases("1x4")
    listed = runs(tmp_path, {name: {**BASE, **case} for name, case in many.items()}, "many")
    others = {"ddp": "zero3", "fsdp": "zero1", "hybrid": "ddp", "zero2": "fsdp", "zero3": "fsdp"}
    goes_on = {f"{a}-then-{b}": {**BASE, **cases("4x1")[f"{b}-4x1"]} for a, b in others.items()}
    resumed = runs(tmp_path, goes_on, "on")
    for settings, source in zip(resumed, others, strict=True):
        settings["cut"] = [str(tmp_path / "many" / f"{source}-4x1"), 5]
    launched(tmp_path, listed + resumed)
    expected = final_weights(one)
    for run in [*(tmp_path / "many").iterdir(), *(tmp_path / "on").iterdir()]:
        check_equal(one, run)
        assert len(read_metrics(run)) == 10, run
        weights = final_weights(run)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            # AdamW turns the last bits of a vanishing gradient into steps of any sign.
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=str(run))


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(tmp_path):
    alone: Mapping[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    single = {
        "plain": {**BASE, **alone},
        "fsdp": {**BASE, **alone, "fsdp": "full_shard"},
        "zero3": {**BASE, **alone, "zero_stage": 3},
    }
    launched(tmp_path, runs(tmp_path, single, "one"), num_processes=1)
    pair = {name: {**BASE, **SHAPES["4x1"], **ENGINES[name]} for name in ("fsdp", "zero3", "zero1")}
    stopped = runs(tmp_path, pair, "two")
    onwards = runs(tmp_path, pair, "onwards")
    for settings, source in zip(onwards, single, strict=True):
        settings["cut"] = [str(tmp_path / "one" / source), 5]
    launched(tmp_path, stopped + onwards)
    back = runs(tmp_path, {"fsdp": single["fsdp"], "zero3": single["plain"]}, "back")
    for settings in back:
        settings["cut"] = [str(tmp_path / "two" / Path(settings["output_dir"]).name), 5]
    launched(tmp_path, back, num_processes=1)
    straight = tmp_path / "one" / "plain"
    for folder in ("one", "two", "onwards", "back"):
        for run in (tmp_path / folder).iterdir():
            check_equal(straight, run)


def test_what_each_rank_holds_and_that_mistakes_are_seen():
    """LoRA, shard sizes, gradients twice as large, means of means: see engine_checks.py."""
    printed = output_of(2, TRAIN_ALL.with_name("engine_checks.py"))
    assert printed.splitlines()[-1] == "all checks held"
