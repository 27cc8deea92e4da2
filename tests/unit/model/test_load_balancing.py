"""The load-balancing loss against transformers' own, on unpadded forwards of single sequences."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from preftune.batching.layout import build_layout
from preftune.errors import ModelError
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.load_balancing import experts_a_token, routing_of
from preftune.model.probe import head_is_plain
from preftune.schema import TokenizedExample
from tests.examples import make_examples
from tests.tiny import tiny_mixture

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 32}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    # Its first layer has no experts.
    "qwen2_moe": (
        "Qwen2Moe",
        QWEN | {"mlp_only_layers": [0], "shared_expert_intermediate_size": 32},
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN),
    "olmoe": ("Olmoe", QWEN),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
}
LAYOUTS = ["shared_prefix", "concatenated", "separate"]


def make_policy(name: str) -> PolicyModel:
    kind, own = MIXTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | own))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return PolicyModel(model, compact_head=head_is_plain(model))


def batch() -> list[TokenizedExample]:
    """Pairs of very different lengths, the first two on one prompt."""
    first, second, *others = make_examples(4, seed=3)
    return [first, replace(second, prompt_ids=first.prompt_ids), *others]


def expected_loss(model: Any, examples: list[TokenizedExample], layout: str) -> torch.Tensor:
    """By transformers: its own forward of one sequence at a time, its own loss on their tokens."""
    pieces, seen = [], set()
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([[*example.prompt_ids, *completion.ids]])
            layers = model(input_ids=ids, output_router_logits=True).router_logits
            # A packed row holds each prompt once.
            is_there = layout == "shared_prefix" and example.prompt_ids in seen
            first = len(example.prompt_ids) if is_there else 0
            pieces.append([layer.reshape(ids.shape[1], -1)[first:] for layer in layers])
            seen.add(example.prompt_ids)
    together = tuple(torch.cat(layer) for layer in zip(*pieces, strict=True))
    loss = load_balancing_loss_func(together, num_experts=4, top_k=2)
    assert isinstance(loss, torch.Tensor)
    return loss


def gradient(model: Any) -> torch.Tensor:
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MIXTURES)
def test_it_equals_that_of_transformers_on_real_tokens(name, layout):
    policy = make_policy(name)
    expected = expected_loss(policy.model, batch(), layout)
    expected.backward()
    expected_gradient = gradient(policy.model)
    if layout == "shared_prefix":
        policy.model.set_attn_implementation(SEGMENTS)
    routing = pair_logps(policy, build_layout(batch(), layout), with_routing=True).routing
    assert routing is not None
    routing.loss.backward()
    # Experts are not taken alike, or the comparison would see little.
    assert routing.loss.item() > 2.001
    assert routing.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    off = (gradient(policy.model) - expected_gradient).norm()
    assert off <= 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_are_computed_again_give_the_same(layout):
    policy = PolicyModel(tiny_mixture()).train()
    gradients, losses = [], []
    for checkpointing in (False, True):
        if checkpointing:
            enable = getattr(policy.model, "activation_checkpointing_enable", None)
            (enable or policy.model.gradient_checkpointing_enable)({"use_reentrant": False})
        if layout == "shared_prefix":
            policy.model.set_attn_implementation(SEGMENTS)
        result = pair_logps(policy, build_layout(batch(), layout), with_routing=True)
        assert result.routing is not None
        (result.sums.sum() + 100 * result.routing.loss).backward()
        losses.append(result.routing.loss.detach())
        gradients.append(gradient(policy.model))
    assert torch.equal(*losses)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-5)


def test_one_layer_by_hand():
    """Four tokens of two experts, one expert a token; the last token is padding.

    Expert 0 is taken by two of three tokens, and its mean probability is (0.8 + 0.6 + 0.1)/3 = 1/2:
    2·(2/3·1/2 + 1/3·1/2) = 1. With the padding counted it would be 2·(3/4·0.625 + 1/4·0.375).
    """
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [1.0, 1e-9]])
    real = torch.tensor([True, True, True, False])
    routing = routing_of([probabilities.log()], 1, real)
    assert routing.taken.tolist() == [2, 1]
    assert routing.loss.item() == pytest.approx(1.0, abs=1e-6)
    padded = routing_of([probabilities.log()], 1, torch.ones_like(real))
    assert padded.loss.item() == pytest.approx(1.125, abs=1e-6)
    layers = routing_of([probabilities.log()] * 3, 1, real)
    assert layers.loss.item() == pytest.approx(1.0, abs=1e-6)
    assert layers.num_tokens.item() == 9


def test_experts_taken_alike_give_top_k():
    logits = torch.eye(4).repeat(5, 1) * 1e-3
    loss = routing_of([logits + logits.roll(1, 1)], 2, torch.ones(20, dtype=torch.bool)).loss
    assert loss.item() == pytest.approx(2.0, abs=1e-6)


def test_asking_for_it_changes_no_bit_of_the_log_probs():
    policy = PolicyModel(tiny_mixture())
    layout = build_layout(batch(), "concatenated")
    before = pair_logps(policy, layout)
    asked = pair_logps(policy, layout, with_routing=True)
    after = pair_logps(policy, layout)
    assert before.routing is after.routing is None
    assert torch.equal(before.sums, asked.sums)
    assert torch.equal(before.sums, after.sums)
    assert policy.model.config.output_router_logits is False


def test_a_model_with_other_routers_is_refused():
    with pytest.raises(ModelError, match=r"logits of shapes \[\(6, 4\)\] for 5 tokens"):
        routing_of([torch.zeros(6, 4)] * 2, 2, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ModelError, match=r"shapes \[\] for 5 tokens"):
        routing_of([], 2, torch.ones(5, dtype=torch.bool))


def test_models_with_routers_are_known_by_their_config():
    def of(kind: str, **settings: Any) -> int | None:
        return experts_a_token(getattr(transformers, f"{kind}Config")(**settings))

    assert of("Mixtral", num_experts_per_tok=3) == 3
    assert of("Qwen3Moe", num_experts_per_tok=5) == 5
    assert of("Olmoe") == 8
    assert of("Llama") is None
    assert of("DeepseekV3") is None  # balanced by a bias, without logits of a softmax
    assert of("ViT") is None
