"""Prompts that are scored where the model reads them anyway, against plain transformers."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from preftune.batching.layout import Layout, LengthLimits, build_layout
from preftune.losses import PairLoss
from preftune.losses.orpo import ORPO
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import choose_layout
from preftune.objective import as_pairs
from tests.examples import make_examples
from tests.tiny import tiny_model

LAYOUTS = ["shared_prefix", "concatenated", "separate"]


def examples():
    """Two rows share a prompt, and one has a prompt of one token."""
    rows = make_examples(4, completion=(1, 9))
    rows[2] = replace(rows[2], prompt_ids=rows[0].prompt_ids)
    rows[3] = replace(rows[3], prompt_ids=(7,))
    return rows


def policy_of(layout: str) -> PolicyModel:
    policy = PolicyModel(tiny_model().double())
    choose_layout(policy, layout, "auto", 64)
    return policy


def plain_logps(model, ids) -> torch.Tensor:
    """Log-prob of every token but the first."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return -F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("limits", [LengthLimits(), LengthLimits(switches=(9,))])
@pytest.mark.parametrize("ld_alpha", [1.0, 0.5])
def test_the_answer_behind_the_others_is_the_prompt(layout, limits, ld_alpha):
    rows, plain = examples(), tiny_model().double()
    laid_out = build_layout(rows, Layout(layout, limits, ld_alpha, scores_prompt=True))
    without = build_layout(rows, Layout(layout, limits, ld_alpha))
    policy = policy_of(layout)
    found, usual = pair_logps(policy, laid_out), pair_logps(policy, without)
    assert laid_out.num_tokens == without.num_tokens
    assert torch.equal(found.sums.view(-1, 3)[:, :2].flatten(), usual.sums)
    assert torch.equal(found.counted.view(-1, 3)[:, :2].flatten(), usual.counted)
    for number, row in enumerate(rows):
        expected = plain_logps(plain, row.prompt_ids) if len(row.prompt_ids) > 1 else torch.zeros(1)
        assert found.sums[3 * number + 2].item() == pytest.approx(expected.sum().item(), abs=1e-9)
        assert found.counted[3 * number + 2] == found.sums[3 * number + 2]
        assert found.lengths[3 * number + 2] == len(row.prompt_ids) - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_orpos_gradient_on_sequences_is_that_of_transformers_own_loss(layout):
    """Fine-tuning alone: its odds ratio weighs nothing."""
    rows, plain, policy = examples(), tiny_model().double(), policy_of(layout)
    laid_out = build_layout(rows, Layout(layout, scores_prompt=True))
    logps = as_pairs(pair_logps(policy, laid_out), None, with_prompt=True)
    result = ORPO(beta=1e-300, orpo_nll="sequence")(logps)
    assert isinstance(result, PairLoss)
    result.values.mean().backward()
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.completions[0].ids]])
        (plain(ids, labels=ids).loss / len(rows)).backward()
    for own, theirs in zip(policy.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, theirs.grad, atol=1e-9)
