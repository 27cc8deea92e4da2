"""A model comes from rank 0's host to all ranks, one part at a time."""

import copy

import pytest
import torch
from torch import nn

from preftune.distributed.delivery import Delivery, repeated_layers
from preftune.distributed.fsdp import check_layers_apart
from preftune.errors import ConfigError, ModelError
from preftune.model.forward import PolicyModel
from tests.ranks import on_ranks
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def policies(number: int) -> list[PolicyModel]:
    """On rank 0 with its weights, on the others without; embedding and head are one."""
    whole = tiny_model(tie_word_embeddings=True)
    whole.register_buffer("kept", torch.arange(3.0))
    whole.plain = torch.tensor([True, False])
    others = [copy.deepcopy(whole) for _ in range(number - 1)]
    for other in others:
        other.to("meta").tie_weights()
        other.plain = other.plain.to("meta")
    return [PolicyModel(model) for model in (whole, *others)]


def tensors(policy: PolicyModel) -> dict[str, torch.Tensor]:
    named = dict(policy.named_parameters()) | dict(policy.named_buffers())
    return named | {"plain": policy.model.plain}


def test_every_rank_gets_rank_0s_numbers():
    models = policies(3)
    expected = {name: tensor.clone() for name, tensor in tensors(models[0]).items()}
    trained = models[0].model.model.layers[0].mlp.up_proj.weight

    def work(ranks):
        Delivery(models[ranks.rank], CPU, ranks).bring(models[ranks.rank])

    assert on_ranks(3, work) == [None] * 3
    for policy in models:
        got = tensors(policy)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
        assert all(p.requires_grad for p in policy.parameters())
    assert models[0].model.model.layers[0].mlp.up_proj.weight is trained


def test_what_was_not_asked_for_has_not_come():
    models = policies(2)

    def work(ranks):
        policy = models[ranks.rank]
        delivery = Delivery(policy, CPU, ranks)
        for layer in repeated_layers(policy):
            delivery.bring(layer)
            # As an engine does: only its part stays.
            for parameter in layer.parameters():
                parameter.data = parameter.data.flatten()[:1].clone()
            whole = sum(p.numel() for p in policy.parameters() if not p.is_meta)
            held = sum(p.numel() for p in layer.parameters())
            assert ranks.rank == 0 or whole <= held * len(repeated_layers(policy))
        delivery.bring(policy)
        return [tuple(p.shape) for layer in repeated_layers(policy) for p in layer.parameters()]

    first, second = on_ranks(2, work)
    # What an engine has cut is left alone when the rest comes.
    assert first == second
    assert set(first) == {(1,)}


def test_other_shapes_on_a_rank_are_refused():
    models = [*policies(1), PolicyModel(tiny_model(hidden_size=64))]
    outcomes = on_ranks(2, lambda ranks: Delivery(models[ranks.rank], CPU, ranks))
    assert {type(outcome) for outcome in outcomes} == {ConfigError}
    assert "shapes of weights" in str(outcomes[0])


def test_layers_that_share_weights_are_refused_by_name():
    policy = PolicyModel(tiny_model(tie_word_embeddings=True))
    layers = repeated_layers(policy)
    check_layers_apart(policy, layers)  # embedding and head are both outside of layers
    assert isinstance(layers[1].mlp.up_proj, nn.Linear)
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        check_layers_apart(policy, layers)
