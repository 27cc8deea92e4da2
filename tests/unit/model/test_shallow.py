"""A model cut short has one layer of every kind, and is whole again afterwards."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from preftune.distributed.delivery import repeated_layers
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import choose_layout
from preftune.model.shallow import num_of_all_kinds, shallow
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def gemma() -> PolicyModel:
    """Seven layers, of which the third and the sixth see all tokens."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=kinds,
    )
    return PolicyModel(Gemma3ForCausalLM(config).eval())


def test_layers_of_one_kind_are_one_layer():
    assert num_of_all_kinds(repeated_layers(tiny_model(num_hidden_layers=5))) == 1


def test_a_pattern_is_kept():
    assert num_of_all_kinds(repeated_layers(gemma())) == 3


def test_the_layout_is_chosen_on_the_short_model_and_the_model_is_whole_again():
    policy = gemma()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    seen = []
    policy.model.model.register_forward_hook(
        lambda module, args, output: seen.append(len(module.layers))
    )
    with shallow(policy, CPU):
        assert len(repeated_layers(policy)) == policy.model.config.num_hidden_layers == 3
        choice = choose_layout(policy, "auto", "auto", longest=64)
    assert choice == choose_layout(gemma(), "auto", "auto", longest=64)
    assert choice.name == "shared_prefix"
    assert set(seen) == {3}
    assert policy.model.config.num_hidden_layers == 7
    after = policy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_failure_leaves_the_model_whole():
    policy = gemma()
    with pytest.raises(ValueError, match="inside"), shallow(policy, CPU):
        raise ValueError("inside")
    assert len(repeated_layers(policy)) == policy.model.config.num_hidden_layers == 7
