"""Adapters under every kind of engine: the steps of one process, from an adapter that says much."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune import ExperimentConfig, train
from tests.adapters import sft_adapter
from tests.distributed.beside_one import TRAIN_ALL, check_equal, runs
from tests.launches import output_of

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    # PEFT's own wrapper asks transformers in a way that is about to go.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
]

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": "full_shard"},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}
QUANTIZED: dict[str, dict[str, Any]] = {}
if find_spec("bitsandbytes") is not None:  # the extra quant
    QUANTIZED = {"4bit": {"load_in_4bit": True}, "8bit": {"load_in_8bit": True}}
BASE = {"use_lora": True, "max_train_samples": 17, "max_train_steps": 6, "eval_steps": 6}
BASE |= {"checkpointing_steps": 3, "learning_rate": 1e-3}
TWO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


def test_two_ranks_train_the_adapter_that_one_does(tmp_path):
    """DDP, FSDP2, ZeRO-2 and -3; a new PiSSA adapter, and one to go on with; and resumed.

    Over weights in 4 and 8 bits, which are not cut, DDP and ZeRO-2.
    """
    starts = {
        "new": {"init_lora_weights": "pissa", "lora_r": 4, "use_rslora": True},
        "sft": {"adapter_name_or_path": sft_adapter(tmp_path / "sft", use_dora=True)},
        **QUANTIZED,
    }
    alone = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    for settings in runs(tmp_path, {k: {**BASE, **alone, **v} for k, v in starts.items()}, "one"):
        train(ExperimentConfig(**settings))
    cases = {
        f"{name}-{start}": {**BASE, **TWO, **engine, **options}
        for start, options in starts.items()
        for name, engine in ENGINES.items()
        if start not in QUANTIZED or name in ("ddp", "zero2")
    }
    listed = runs(tmp_path, cases, "many")
    onwards = {f"{name}-new": cases[f"{name}-new"] for name in ("fsdp", "zero3")}
    resumed = runs(tmp_path, onwards, "on")
    for settings, source in zip(resumed, ("zero3", "fsdp"), strict=True):
        settings["cut"] = [str(tmp_path / "many" / f"{source}-new"), 3]
    (tmp_path / "list.json").write_text(json.dumps(listed + resumed))
    output_of(2, TRAIN_ALL, tmp_path / "list.json")
    for run in [*(tmp_path / "many").iterdir(), *(tmp_path / "on").iterdir()]:
        one = tmp_path / "one" / run.name.rpartition("-")[2]
        check_equal(one, run)
        expected, weights = adapter_of(one), adapter_of(run)
        assert weights.keys() == expected.keys()
        for name, tensor in weights.items():
            # AdamW turns the last bits of a vanishing gradient into steps of any sign.
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4, msg=str(run))
