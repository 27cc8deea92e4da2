"""Weights in 4 and 8 bits on a GPU: what they stand for, in training as in evaluation, no waits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import train
from preftune.config.lora import LoRAConfig
from preftune.config.model import ModelConfig
from preftune.distributed.runtime import AUTOCAST, Runtime
from preftune.model.adapters import StartAdapter, add_adapter
from preftune.model.load import load_model
from preftune.model.quantization import dequantized, num_bytes, quantized_layers
from tests.runs import read_metrics, tiny_config
from tests.syncs import take_steps_without_waiting
from tests.tiny import tiny_model

pytest.importorskip("bitsandbytes", reason="needs the extra quant")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4-single": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    },
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(attention_bias=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_its_weights_stand_for_and_what_a_cpu_makes_of_them(folder, kind):
    config = ModelConfig(model_name_or_path=str(folder), **KINDS[kind])
    models = [load_model(config, torch.device(name)).policy for name in ("cuda", "cpu")]
    assert num_bytes(models[0]) == num_bytes(models[1])
    on_cpu = quantized_layers(models[1])
    for name, layer in quantized_layers(models[0]).items():
        weight = dequantized(layer)
        torch.testing.assert_close(weight.cpu(), dequantized(on_cpu[name]), rtol=0, atol=1e-3)
        rows = torch.randn(7, layer.in_features, device="cuda", requires_grad=True)
        with torch.no_grad():
            evaluated = layer.eval()(rows)
        trained = layer.train()(rows)
        # A GPU may take another kernel where nothing has to be kept for a backward.
        torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-4)
        plain = torch.nn.functional.linear(rows, weight, layer.bias)
        torch.testing.assert_close(trained, plain, rtol=0, atol=1e-3)
        got, expected = (torch.autograd.grad(y.sum(), rows)[0] for y in (trained, plain))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_a_run_passes_the_check_before_its_first_step_and_learns(tmp_path, kind, precision):
    options = KINDS[kind] | {"use_lora": True, "mixed_precision": precision, "num_epochs": 8.0}
    folder = train(tiny_config(tmp_path, learning_rate=1e-2, **options)).folder.root
    lines = read_metrics(folder)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=0.02)
    assert lines[-1]["loss"] < 0.5 < lines[0]["loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_a_step_waits_for_nothing(folder, kind, precision):
    runtime = Runtime(precision, seed=0)
    config = ModelConfig(model_name_or_path=str(folder), **KINDS[kind])
    loaded = load_model(config, runtime.device, AUTOCAST[precision])
    policy = loaded.policy
    add_adapter(policy.model, StartAdapter(LoRAConfig(use_lora=True), seed=0))
    take_steps_without_waiting(policy, runtime, precision)
