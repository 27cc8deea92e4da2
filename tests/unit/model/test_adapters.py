"""Adapters in a model: how many parameters, which layers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from preftune.batching.layout import build_layout
from preftune.config.lora import LoRAConfig
from preftune.errors import ConfigError, ModelError
from preftune.model.adapter_files import ADAPTER, target_names
from preftune.model.adapters import StartAdapter, add_adapter, check_adapter, inject, peft_config
from preftune.model.adapters import skeleton as skeleton_of
from preftune.model.forward import PolicyModel, pair_logps
from tests.examples import make_examples
from tests.tiny import tiny_model
from tests.unit.model.test_forward import ARCHITECTURES, make_model, plain_logps

# PEFT's own wrapper asks transformers in a way that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32}
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora(**options: Any) -> LoRAConfig:
    config = LoRAConfig(use_lora=True, **options)
    assert config.problems() == []
    return config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_many_parameters_as_pefts_own_model_has(name):
    own = make_model(name)
    add_adapter(own, StartAdapter(lora(lora_r=4), seed=0))
    transposed = "gpt2" in name
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings.fan_in_fan_out = transposed
    pefts: Any = get_peft_model(make_model(name), settings)
    number, _ = pefts.get_nb_trainable_parameters()
    assert trainable(own) == number > 0
    layers = [m for m in own.modules() if hasattr(m, "lora_A")]
    assert number == sum(4 * (m.in_features + m.out_features) for m in layers)
    assert own.get_output_embeddings() is not None
    assert type(own) is type(make_model(name))


@pytest.mark.parametrize(("shapes", "number"), [(LLAMA_2_7B, 39_976_960), (LLAMA_3_8B, 41_943_040)])
def test_the_counts_of_well_known_sizes_by_hand(shapes, number):
    """r x (d_in + d_out) a matrix, r = 16, seven projections of 32 layers; on no device."""
    layers = {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128}
    model = skeleton_of(transformers.LlamaConfig(**shapes, **layers), trust_remote_code=False)
    check_adapter(lora(lora_target_modules=SEVEN), model)
    assert trainable(model) == number
    hidden, wide = shapes["hidden_size"], shapes["intermediate_size"]
    narrow = 128 * shapes["num_key_value_heads"]
    sums = 2 * (hidden + hidden) + 2 * (hidden + narrow) + 3 * (hidden + wide)
    assert number == 32 * 16 * sums
    assert all(p.is_meta for p in model.parameters())
    # The common estimate, 2 r d for each of seven square matrices, has no wide layers.
    assert 32 * 7 * 2 * 16 * hidden == 29_360_128


def test_all_linear_is_every_linear_layer_but_the_head():
    model = tiny_model()
    add_adapter(model, StartAdapter(lora(), seed=0))
    assert target_names(model) == sorted(SEVEN)
    assert type(model.lm_head) is nn.Linear


def test_names_and_patterns_choose_layers():
    def chosen(targets: str | list[str]) -> list[str]:
        model = tiny_model()
        check_adapter(lora(lora_target_modules=targets), model)
        return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]

    of_layer_1 = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert chosen(r".*\.1\..*[qv]_proj") == of_layer_1
    assert len(chosen(["q_proj", "v_proj"])) == 4
    assert chosen(["1.self_attn.q_proj"]) == of_layer_1[:1]


def test_adapters_are_kept_in_fp32_beside_a_base_in_bf16():
    model = tiny_model().to(torch.bfloat16)
    add_adapter(model, StartAdapter(lora(use_dora=True), seed=0))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_the_first_numbers_come_from_the_seed_alone():
    def numbers(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)  # whatever was drawn before
        model, before = tiny_model(), torch.get_rng_state()
        add_adapter(model, StartAdapter(lora(init_lora_weights="gaussian"), seed=seed))
        assert torch.equal(before, torch.get_rng_state())
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    one, same, other = numbers(0), numbers(0), numbers(1)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_pissa_takes_out_of_the_base_is_taken_again_to_the_same_bits(kind, init):
    model, again = make_model(kind), make_model(kind)
    ids = torch.arange(1, 9).unsqueeze(0)
    before = model(ids).logits
    settings = lora(init_lora_weights=init, lora_r=4)
    adapter = add_adapter(model, StartAdapter(settings, seed=0))
    assert torch.allclose(model(ids).logits, before, atol=1e-4)
    add_adapter(again, StartAdapter(settings, seed=5, taken=adapter.taken))
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(n == m and torch.equal(one, two) for (n, one), (m, two) in pairs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lora_target_modules": ["q_prj"]}, r"'q_prj'.*did you mean q_proj.*its names are q_proj"),
        ({"lora_target_modules": ["q_proj", "wte"]}, r"'wte', and no layer of the model is called"),
        ({"lora_target_modules": "q_proj"}, r"a regular expression, and no layer's whole name"),
        ({"lora_target_modules": "(q_proj"}, r"which is no regular expression"),
        ({"lora_target_modules": ["mlp"]}, r"which is a LlamaMLP and not a linear layer"),
        ({"lora_target_modules": ["lm_head"]}, r"names lm_head, whose weight is the embedding's"),
        ({"lora_target_modules": ".*embed_tokens"}, r"names model.embed_tokens, whose weight is"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save names lm_head, whose weight is"),
        ({"modules_to_save": ["lm_hed"]}, r"'lm_hed'.*did you mean lm_head"),
        (
            {"init_lora_weights": "pissa", "lora_target_modules": ["embed_tokens"]},
            r"whose weight is",
        ),
        ({"init_lora_weights": "pissa", "lora_r": 17}, r"lora_r is 17, and .* has 16; lower"),
    ],
)
def test_what_a_model_cannot_have_is_told_with_what_it_has(options, text):
    model = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match=text):
        check_adapter(lora(**options), model)


# ---------------------------------------------------------------- an adapter to go on with


@pytest.fixture
def folder(tmp_path) -> Path:
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def check(folder: Path, **shapes: Any) -> None:
    start = lora(adapter_name_or_path=str(folder))
    check_adapter(start, skeleton_of(tiny_model(**shapes).config, trust_remote_code=False))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_an_adapter_of_peft_is_taken_as_it_is(folder):
    check(folder)
    model = tiny_model()
    add_adapter(model, StartAdapter(lora(adapter_name_or_path=str(folder)), seed=3))
    own, there = dict(model.named_parameters()), load_file(folder / "adapter_model.safetensors")
    assert trainable(model) == sum(t.numel() for t in there.values())
    for name, tensor in there.items():
        name = name.removeprefix("base_model.model.").replace(".weight", f".{ADAPTER}.weight")
        assert torch.equal(own[name], tensor)
        assert own[name].requires_grad


def test_dropout_may_be_changed(folder):
    change(folder, lora_dropout=0.25)
    kept = peft_config(lora(adapter_name_or_path=str(folder)))
    changed = peft_config(lora(adapter_name_or_path=str(folder), lora_dropout=0.0))
    assert (kept.lora_dropout, changed.lora_dropout) == (0.25, 0.0)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"peft_type": "IA3"}, "whose peft_type is IA3; give a LoRA adapter"),
        ({"task_type": "SEQ_CLS"}, "whose task_type is SEQ_CLS"),
        ({"bias": "all"}, r"which trains biases of its base \(bias in"),
        ({"init_lora_weights": "olora"}, "whose init_lora_weights is 'olora'"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(folder, fields, text):
    change(folder, **fields)
    with pytest.raises(ModelError, match=text):
        check(folder)


def test_an_adapter_of_another_base_is_refused(folder):
    with pytest.raises(ModelError, match=r"of another model .* \(4, 32\) in it and \(4, 64\) here"):
        check(folder, hidden_size=64)


def test_an_adapter_with_other_layers_than_it_says_is_refused(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if ".1." not in k}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match=r"absent in it and \(4, 32\) here \(4 such\)"):
        check(folder)


def test_a_pickled_adapter_is_never_read(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="its weights are pickled"):
        check(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [("{}/gone", "no such folder"), ("{}/empty", "the folder has no adapter_config.json")],
)
def test_a_folder_without_an_adapter_is_told(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=text):
        peft_config(lora(adapter_name_or_path=name.format(tmp_path)))


def test_on_no_device_an_adapter_has_shapes_and_no_numbers():
    model = skeleton_of(tiny_model().config, trust_remote_code=False)
    inject(model, peft_config(lora(init_lora_weights="pissa", use_dora=True)), seed=0)
    assert all(p.is_meta for p in model.parameters())


def test_an_embedding_has_no_singular_directions_to_give():
    model = skeleton_of(tiny_model().config, trust_remote_code=False)
    with pytest.raises(ConfigError, match=r"names model.embed_tokens, an embedding, which"):
        check_adapter(lora(init_lora_weights="pissa", lora_target_modules=["embed_tokens"]), model)


def test_what_was_taken_from_other_layers_is_refused():
    settings = lora(init_lora_weights="pissa", lora_r=4)
    taken = add_adapter(tiny_model(), StartAdapter(settings, seed=0)).taken
    name = next(iter(taken))
    for other in (taken | {name: taken[name][:2]}, {k: taken[k] for k in taken if k != name}):
        with pytest.raises(ModelError, match=f"began with other layers .*{name}"):
            add_adapter(tiny_model(), StartAdapter(settings, seed=0, taken=other))


def test_a_head_that_trains_whole_is_applied_in_chunks():
    """Its logits are never whole, as without an adapter."""
    model = tiny_model()
    add_adapter(model, StartAdapter(lora(modules_to_save=["lm_head"]), seed=0))
    policy = PolicyModel(model)
    calls: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    examples = make_examples(3)
    result = pair_logps(policy, build_layout(examples, "concatenated"))
    expected = plain_logps(model, examples[0].prompt_ids, examples[0].completions[0].ids)
    assert calls == [1]  # by the plain forward alone
    assert torch.allclose(result.per_token[0].double(), expected, atol=2e-5)
    result.sums.sum().backward()
    trained = model.get_parameter(f"lm_head.modules_to_save.{ADAPTER}.weight")
    assert trained.grad is not None
    assert trained.grad.abs().max() > 0
