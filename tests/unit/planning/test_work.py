"""Bytes of a step without numbers, against the same step with numbers and against sums by hand."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.config.experiment import ExperimentConfig
from preftune.distributed.engine import TorchEngine
from preftune.model.adapters import StartAdapter, add_adapter
from preftune.model.attention import REGISTERED
from preftune.model.load import load_model
from preftune.model.quantization import num_bytes
from preftune.objective import objective_of
from preftune.planning.live import LiveBytes, storages_of
from preftune.planning.stand_ins import head_told
from preftune.planning.weights import plan_model, use_packing
from preftune.planning.work import training_work, update_work
from preftune.recipes.loss import loss_of
from preftune.training.optimizer import make_optimizer
from tests.examples import make_examples

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"use_lora": True, "lora_r": 8},
    "lora-checkpointing": {"use_lora": True, "lora_r": 8, "gradient_checkpointing": "selective"},
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            kind, settings = MODELS[name]
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**settings)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        return made[name]

    return make


def config_of(folder: Path, **options: Any) -> ExperimentConfig:
    return ExperimentConfig(model_name_or_path=str(folder), dataset_name="p.jsonl", **options)


def batcher() -> RowBatcher:
    examples = make_examples(6)
    reference = torch.zeros(len(examples), 2, dtype=torch.float64)
    return RowBatcher(examples, reference, Layout("shared_prefix"), torch.device("cpu"))


def real_peak(config: ExperimentConfig, products: torch.dtype | None) -> dict[str, int]:
    """The same step on real tensors, as a run loads and makes it."""
    loaded = load_model(config, torch.device("cpu"), products)
    adapter = StartAdapter.of(config, 0)
    if adapter is not None:
        add_adapter(loaded.policy.model, adapter)
    policy = loaded.policy
    policy.model.set_attn_implementation(REGISTERED["sdpa"])
    if products is not None:
        policy.forward = torch.autocast("cpu", products)(policy.forward)
    policy.train()
    trained = [p for p in policy.parameters() if p.requires_grad]
    live, micro_batch = LiveBytes(), batcher()(range(6))
    live.hold("weights", [*policy.parameters(), *policy.buffers()])
    with head_told(live), live:
        output = objective_of(loss_of(config))(policy, micro_batch)
        output.loss_sum.backward()
        TorchEngine("real", policy, None, 1.0).clip_gradients()  # type: ignore[arg-type]
    live.name("gradients", [p.grad for p in trained if p.grad is not None])
    return live.peak()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("products", [torch.bfloat16, pytest.param(None, marks=pytest.mark.slow)])
def test_without_numbers_it_holds_what_it_holds_with_them(folder_of, name, options, products):
    settings = dict(OPTIONS[options])
    if name == "mixtral" and "use_lora" in settings:
        settings["lora_target_modules"] = ["q_proj", "v_proj"]
    config = config_of(folder_of(name), **settings)
    planned = plan_model(config, config, products=products)
    batch = batcher()
    assert use_packing(planned, batch.lay_out([0]).layout, fused=False)
    work = training_work(
        planned,
        objective_of(loss_of(config)),
        batch(range(6)),
        is_accumulating=False,
        max_grad_norm=1.0,
    )
    real = real_peak(config, products)
    assert sum(work.peak.values()) == pytest.approx(sum(real.values()), rel=0.03)
    for part in {*work.peak, *real}:
        near = pytest.approx(real.get(part, 0), abs=0.02 * sum(real.values()))
        assert work.peak.get(part, 0) == near
    apart = sum(work.moving.values())
    assert max(work.moving.values()) <= apart <= sum(work.peak.values())


def flops_of(folder: Path, **options: Any) -> dict[str, int]:
    config, batch = config_of(folder, **options), batcher()
    planned = plan_model(config, config, products=None)
    assert use_packing(planned, batch.lay_out([0]).layout, fused=False)
    objective = objective_of(loss_of(config))
    once = {"is_accumulating": False, "max_grad_norm": 1.0}
    return training_work(planned, objective, batch(range(6)), **once).flops


def test_arithmetic_by_hand_and_what_checkpointing_adds(folder_of):
    plain = flops_of(folder_of("llama"))
    layout = batcher().lay_out(range(6)).layout
    tokens, scored = layout.num_tokens, sum(int(b.lengths.sum()) for b in layout.blocks)
    # Of a layer: q and o, k and v for half as many heads, three of the MLP.
    weights = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plain["other"] == pytest.approx(6 * weights * tokens, rel=0.01)
    # Logits once more in the backward.
    assert plain["head"] == 8 * 300 * 64 * scored
    again = flops_of(folder_of("llama"), gradient_checkpointing=True)
    # All but a layer's last product: PyTorch stops when it has what the backward needs.
    twice = weights - 3 * 64 * 128
    assert again["other"] / plain["other"] == pytest.approx((3 * weights + twice) / (3 * weights))
    assert again["attention"] / plain["attention"] == pytest.approx(4.5 / 3.5, rel=0.01)
    assert again["head"] == plain["head"]


LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def test_parameters_and_bytes_of_a_7b_by_hand(tmp_path):
    LlamaConfig(**LLAMA_2_7B).save_pretrained(tmp_path)  # no weights are there
    config = config_of(tmp_path, use_lora=True, dtype="bfloat16")
    found = plan_model(config, config, products=torch.bfloat16)
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    total = 32 * layer + 2 * 32000 * 4096 + 4096
    assert total == 6_738_415_616
    assert found.parameters.trainable == 39_976_960
    assert found.parameters.total == total + 39_976_960
    per_module = {name: 32 * 16 * 2 * 4096 for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    per_module |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 32 * 16 * (4096 + 11008))
    assert found.parameters.lora_by_module == per_module
    held = storages_of(found.policy.parameters())
    assert held == 2 * total + 4 * 39_976_960  # adapters in fp32
    quantized = config_of(tmp_path, use_lora=True, load_in_4bit=True, dtype="bfloat16")
    packed = plan_model(quantized, quantized, products=torch.bfloat16)
    in_four = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert packed.parameters.quantized == in_four
    linear = storages_of([*packed.policy.parameters(), *packed.policy.buffers()])
    rest = 2 * (total - in_four) + 4 * 39_976_960
    # Half a byte, a byte for 64 and 4 bytes for 64 x 256 numbers; three tables a layer.
    blocks = in_four // 64
    tables = 7 * 32 * (64 + 1024 + 4)
    buffers = storages_of(b for n, b in packed.policy.named_buffers() if "scales" not in n)
    assert linear == rest + in_four // 2 + blocks + blocks // 256 * 4 + tables + buffers


@pytest.mark.parametrize("double", [True, False])
def test_packed_weights_take_what_bitsandbytes_takes(folder_of, double):
    pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    options = {"use_lora": True, "load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    config = config_of(folder_of("llama"), **options)
    planned = plan_model(config, config, products=None).policy
    loaded = load_model(config, torch.device("cpu"))
    add_adapter(loaded.policy.model, StartAdapter(config, 0))
    held = storages_of([*planned.parameters(), *planned.buffers()])
    assert held == num_bytes(loaded.policy)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_torch_8bit", "adafactor", "muon", "sgd"])
def test_state_is_that_of_a_real_optimizer(folder_of, optimizer):
    config = config_of(folder_of("llama"), optimizer=optimizer)
    planned = plan_model(config, config, products=None)
    found = update_work(planned, partial(make_optimizer, config=config, seed=0), optimizer)
    policy = load_model(config, torch.device("cpu")).policy
    real = make_optimizer(policy, config)
    real.found_inf, real.grad_scale = torch.zeros(()), None  # type: ignore[attr-defined]
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real.step()
    states = [t for s in real.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    assert found.state == storages_of(states)
    if optimizer == "adamw":
        steps = 4 * len(states) // 3
        assert found.state == 8 * planned.parameters.trainable + steps
