"""Weights in 4 and 8 bits: what they hold, count and compute."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from preftune.config.model import ModelConfig, another_model
from preftune.errors import ModelError
from preftune.model.load import LoadedModel, load_model
from preftune.model.quantization import (
    dequantized,
    make_right,
    names_to_quantize,
    num_bytes,
    num_quantized,
    quantized_again,
    quantized_layers,
)
from preftune.recipes.merge import _set_weight
from preftune.reference.fingerprints import namespace_fields, namespace_key, weights_fingerprint
from tests.tiny import tiny_model
from tests.unit.model.test_forward import ARCHITECTURES, make_model

pytest.importorskip("bitsandbytes", reason="needs the extra quant")

IDS = torch.arange(3, 40).unsqueeze(0)
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-single": {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
    "bf16-products": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"},
    "8bit": {"load_in_8bit": True},
}


def loaded_as(folder: Path, **options: Any) -> LoadedModel:
    config = ModelConfig(model_name_or_path=str(folder), **options)
    return load_model(config, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(attention_bias=True, tie_word_embeddings=True).save_pretrained(path)
    return path


def by_hand(model: torch.nn.Module, kind: str) -> int:
    """Bytes of a model whose linear layers are in 4 or 8 bits."""
    total = 0
    for name, p in model.named_parameters():
        number = p.numel()
        if "_proj.weight" not in name:
            total += 4 * number
            continue
        blocks = math.ceil(number / 64)
        codes = 16 * 4  # the table of the 16 values, fp32
        total += {
            "8bit": number + 4 * p.shape[0],
            "nf4-single": number // 2 + 4 * blocks + codes,
            # A byte a block; for those a scale in fp32 for 256 blocks, a table, and their mean.
            "nf4": number // 2 + blocks + 4 * math.ceil(blocks / 256) + codes + 256 * 4 + 4,
        }[kind]
    return total + sum(b.numel() * b.element_size() for b in model.buffers())


@pytest.mark.parametrize("kind", ["nf4", "nf4-single", "8bit"])
def test_as_many_bytes_as_by_hand_and_as_many_parameters_as_before(folder, kind):
    plain, loaded = loaded_as(folder), loaded_as(folder, **KINDS[kind])
    assert num_bytes(loaded.policy) == by_hand(plain.policy, kind)
    assert loaded.num_parameters == plain.num_parameters
    linear = [p for n, p in plain.policy.named_parameters() if "_proj.weight" in n]
    assert num_quantized(loaded.policy) == sum(p.numel() for p in linear)
    assert num_quantized(plain.policy) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_it_says_what_the_weights_that_it_stands_for_say(tmp_path, name):
    """Of every architecture: the layers meant are in 4 bits, head and embedding are not."""
    make_model(name).save_pretrained(tmp_path)
    plain, packed = loaded_as(tmp_path).policy.model, loaded_as(tmp_path, load_in_4bit=True)
    layers = quantized_layers(packed.policy.model)
    assert layers.keys() == names_to_quantize(plain)
    assert packed.policy.compact_head
    assert packed.num_parameters == sum(p.numel() for p in plain.parameters())
    for layer_name, layer in layers.items():
        _set_weight(plain.get_submodule(layer_name), dequantized(layer))
    got = packed.policy.model(IDS).logits
    torch.testing.assert_close(got, plain(IDS).logits, rtol=0, atol=2e-5)
    original = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (original(IDS).logits - got).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_function_with_and_without_gradients(folder, kind):
    """bitsandbytes would pack the weight anew, or round its inputs, in evaluation on a CPU."""
    model = loaded_as(folder, **KINDS[kind]).policy.model
    before = weights_fingerprint(model)
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for layer in quantized_layers(model).values():
        rows = hidden if layer.in_features == 32 else hidden.repeat(1, 2)
        with torch.no_grad():
            evaluated = layer.eval()(rows)
            alone = layer(rows[:1])
        trained = layer.train()(rows)
        assert torch.equal(evaluated, trained)
        torch.testing.assert_close(alone, evaluated[:1], rtol=0, atol=2e-6)
        plain = (
            rows.to(getattr(layer, "compute_dtype", torch.float32)).float() @ dequantized(layer).T
        )
        if layer.bias is not None:
            plain = plain + layer.bias.float()
        atol = 0.02 if kind == "bf16-products" else 1e-5
        torch.testing.assert_close(trained.float(), plain, rtol=0, atol=atol)
        (got,) = torch.autograd.grad(trained.sum(), hidden)
        (expected,) = torch.autograd.grad(plain.sum(), hidden)
        torch.testing.assert_close(got, expected, rtol=0, atol=10 * atol)
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("kind", ["nf4", "fp4", "8bit"])
def test_products_of_8_bits_follow_autocast_and_all_give_its_type_back(folder, kind):
    model = loaded_as(folder, **KINDS[kind]).policy.model
    with torch.autocast("cpu", torch.bfloat16):
        half = model(IDS).logits
    exact = model(IDS).logits
    assert 0 < (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_quantised_again_is_what_loading_makes_of_a_weight(folder, kind):
    plain = loaded_as(folder).policy.model
    config = ModelConfig(model_name_or_path=str(folder), **KINDS[kind])
    model = load_model(config, torch.device("cpu")).policy.model
    for name, layer in quantized_layers(model).items():
        again = quantized_again(plain.get_submodule(name).weight, config)
        assert torch.equal(again, dequantized(layer)), name


def test_every_setting_has_its_own_reference_values(folder):
    keys = set()
    for kind in [{}, *KINDS.values()]:
        policy = loaded_as(folder, **kind).policy
        settings = {"precision": "fp32", "layout": "shared_prefix", "device": "cpu"}
        keys.add(namespace_key(namespace_fields(policy, **settings)))
        again = loaded_as(folder, **kind).policy
        assert namespace_key(namespace_fields(again, **settings)) in keys
    assert len(keys) == 1 + len(KINDS)


def test_a_reference_of_its_own_is_quantised_alike():
    options = KINDS["fp4"] | {"bnb_4bit_compute_dtype": "bfloat16"}
    config = ModelConfig(model_name_or_path="policy", **options)
    assert another_model(config, "reference").quantization == config.quantization
    assert len(config.quantization) == 4


def test_a_model_without_layers_for_it_is_refused():
    with pytest.raises(ModelError, match="has no linear layers that bitsandbytes could quantise"):
        make_right(tiny_model())
