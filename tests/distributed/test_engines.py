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


def launched(root: Path, listed: list[Any], *script: Path, num_processes: int = 2) -> str:
    (root / "list.json").write_text(json.dumps(listed))
    return output_of(num_processes, TRAIN_ALL, root / "list.json", *script)


def cases(shape: str) -> dict[str, dict[str, Any]]:
    return {f"{name}-{shape}": {**engine, **SHAPES[shape]} for name, engine in ENGINES.items()}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


OTHERS = {"ddp": "zero3", "fsdp": "zero1", "hybrid": "ddp", "zero2": "fsdp", "zero3": "fsdp"}
"""What an engine's checkpoint goes on under."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Ten steps of 8, 8 and 1 pairs in one/, many/ and on/; and what was printed."""
    root = tmp_path_factory.mktemp("engines")
    alone = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    (settings,) = runs(root, {"run": {**BASE, **alone}}, "one")
    train(ExperimentConfig(**settings))
    many = cases("4x1") | cases("1x4")
    listed = runs(root, {name: {**BASE, **case} for name, case in many.items()}, "many")
    goes_on = {f"{a}-then-{b}": {**BASE, **cases("4x1")[f"{b}-4x1"]} for a, b in OTHERS.items()}
    resumed = runs(root, goes_on, "on")
    for settings, source in zip(resumed, OTHERS, strict=True):
        settings["cut"] = [str(root / "many" / f"{source}-4x1"), 5]
    return root, launched(root, listed + resumed, TRAIN_ALL.with_name("engine_checks.py"))


def test_every_engine_takes_the_steps_of_one_process_and_any_goes_on(trained):
    """From a policy that is not the reference, with evaluation."""
    root, _ = trained
    one = root / "one" / "run"
    expected = final_weights(one)
    found = [*(root / "many").iterdir(), *(root / "on").iterdir()]
    assert len(found) == len(ENGINES) * len(SHAPES) + len(OTHERS)
    for run in found:
        check_equal(one, run)
        assert len(read_metrics(run)) == 10, run
        weights = final_weights(run)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            # AdamW turns the last bits of a vanishing gradient into steps of any sign.
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5, msg=str(run))


def test_what_each_rank_holds_and_that_mistakes_are_seen(trained):
    """LoRA, shard sizes, gradients twice as large, means of means: see engine_checks.py."""
    _, printed = trained
    assert printed.splitlines()[-1] == "all checks held"


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(tmp_path):
    """The reference is the policy's own start, which the engine has cut by then."""
    base: Mapping[str, Any] = BASE | {"reference_model_name_or_path": None}
    alone = {**base, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    single = {
        "plain": alone,
        "fsdp": {**alone, "fsdp": "full_shard"},
        "zero3": {**alone, "zero_stage": 3},
    }
    launched(tmp_path, runs(tmp_path, single, "one"), num_processes=1)
    pair = {name: {**base, **SHAPES["4x1"], **ENGINES[name]} for name in ("fsdp", "zero3", "zero1")}
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
