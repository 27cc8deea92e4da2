"""A reference that follows the policy: what a sync does to its weights."""

import pytest
import torch

from preftune.batching.layout import build_layout
from preftune.distributed.runtime import Runtime
from preftune.model.forward import PolicyModel, pair_logps
from preftune.reference.live import LiveReference
from tests.examples import make_examples
from tests.tiny import tiny_model

HEALTHY, DIVERGED = torch.tensor(True), torch.tensor(False)


def moved_apart(*, mixup_alpha=0.6, sync_steps=3, dtype=torch.float32, **settings):
    """A policy, the live reference made of it, and the weights of both after the policy moved."""
    policy = PolicyModel(tiny_model(**settings).to(dtype))
    live = LiveReference(policy, Runtime("fp32", 0), mixup_alpha=mixup_alpha, sync_steps=sync_steps)
    before = weights(policy.model)
    assert torch.equal(weights(live.model), before)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += torch.randn_like(parameter)
    return policy, live, before


def weights(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("tied", [False, True])
def test_a_sync_mixes_the_policy_in(tied):
    """By hand: 0.6 of the policy, 0.4 of what it was."""
    policy, live, before = moved_apart(tie_word_embeddings=tied)
    live.follow(3, HEALTHY)
    expected = 0.6 * weights(policy.model).double() + 0.4 * before.double()
    assert torch.allclose(weights(live.model).double(), expected, rtol=0, atol=1e-6)
    live.follow(6, HEALTHY)
    expected = 0.84 * weights(policy.model).double() + 0.16 * before.double()
    assert torch.allclose(weights(live.model).double(), expected, rtol=0, atol=1e-6)


def test_bfloat16_weights_are_mixed_to_their_last_bit():
    policy, live, before = moved_apart(dtype=torch.bfloat16)
    live.follow(3, HEALTHY)
    expected = 0.6 * weights(policy.model).double() + 0.4 * before.double()
    off = (weights(live.model).double() - expected).abs()
    assert (off <= 2**-8 * expected.abs() + 1e-6).all()


def test_with_alpha_1_the_reference_becomes_the_policy():
    policy, live, _ = moved_apart(mixup_alpha=1.0)
    live.follow(3, HEALTHY)
    assert torch.equal(weights(live.model), weights(policy.model))


@pytest.mark.parametrize(("step", "healthy"), [(2, HEALTHY), (4, HEALTHY), (3, DIVERGED)])
def test_it_stays_between_syncs_and_after_a_bad_step(step, healthy):
    _, live, before = moved_apart()
    live.follow(step, healthy)
    assert torch.equal(weights(live.model), before)


def test_it_scores_as_the_policy_did_without_dropout_or_gradient():
    policy = PolicyModel(tiny_model(attention_dropout=0.5))
    layout = build_layout(make_examples(3), "concatenated")
    expected = pair_logps(policy, layout).sums
    live = LiveReference(policy.train(), Runtime("fp32", 0), mixup_alpha=1.0, sync_steps=1)
    got = live.logps(layout)
    assert torch.equal(got, expected.detach())
    assert not got.requires_grad
    assert policy.training
    assert not any(p.requires_grad for p in live.model.parameters())
    assert all(p.requires_grad for p in policy.parameters())
