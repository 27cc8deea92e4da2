"""LD-DPO: what an answer says beyond its rival's length weighs `ld_alpha`.

The oracle is plain transformers in float64, one unpadded row at a time, with weights by hand.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout, build_layout
from preftune.distributed.runtime import Runtime
from preftune.losses import DPOLossType, combine, make_loss
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import choose_layout
from preftune.objective import PairObjective, as_pairs
from preftune.reference.build import reference_logps
from preftune.reference.live import LiveReference
from preftune.reference.store import ReferenceStore
from preftune.schema import Completion, TokenizedExample
from tests.examples import make_examples
from tests.tiny import tiny_model

CPU = torch.device("cpu")
LAYOUTS = ["shared_prefix", "concatenated", "separate"]
ALPHA = 0.3


def masked_pair() -> TokenizedExample:
    """Of five chosen tokens three are scored, of two rejected ones both: the fifth is the tail."""
    chosen = Completion((7, 8, 9, 10, 11), (True, False, True, False, True))
    roles = ("chosen", "rejected")
    return TokenizedExample("masked", (5, 6), (chosen, Completion((12, 13))), roles, "s", 99)


EXAMPLES = [*make_examples(5, completion=(1, 12)), masked_pair()]


def plain_logps(model, example: TokenizedExample, side: int) -> torch.Tensor:
    """Per-token log-probs of the scored tokens, by transformers' own logits."""
    prompt, answer = example.prompt_ids, example.completions[side]
    logits = model(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    per_token = -F.cross_entropy(logits.double(), torch.tensor(answer.ids), reduction="none")
    return per_token[list(answer.scored or [True] * len(answer.ids))]


def by_hand(model, example: TokenizedExample) -> list[torch.Tensor]:
    """The weighted sums of chosen and rejected."""
    sides = [plain_logps(model, example, side) for side in (0, 1)]
    shared = min(map(len, sides))
    return [side[:shared].sum() + ALPHA * side[shared:].sum() for side in sides]


def models() -> tuple[PolicyModel, PolicyModel]:
    """A policy and another reference, in float64."""
    policy, reference = (tiny_model(seed=seed).double() for seed in (0, 1))
    return PolicyModel(policy), PolicyModel(reference)


def reference_sums(folder, model, examples, layout: Layout):
    store = ReferenceStore(folder, "ns", {})
    return reference_logps(model, examples, store, layout=layout, device=CPU)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_are_those_of_plain_transformers(tmp_path, name):
    policy, reference = models()
    plain_policy, plain_reference = (copy.deepcopy(m.model) for m in (policy, reference))
    for model in (policy, reference):
        choose_layout(model, name, "auto", longest=64)
    layout = Layout(name, ld_alpha=ALPHA)
    sums = reference_sums(tmp_path, reference, EXAMPLES, layout).sums
    # ipo's mean divides by the whole length, as TRL's does; fine-tuning is on every token alike.
    ipo = make_loss(DPOLossType.IPO, ipo_log_ratios="mean")
    objective = PairObjective(combine([make_loss(DPOLossType.DPO), ipo], [1.0, 0.02], 0.5))
    output = objective(policy, RowBatcher(EXAMPLES, sums, layout, CPU)(range(len(EXAMPLES))))
    output.loss_sum.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])

    expected, plain = [], []
    for example in EXAMPLES:
        w, other = by_hand(plain_policy, example)
        ref_w, ref_other = by_hand(plain_reference, example)
        plain.append(plain_logps(plain_policy, example, 0))
        num_w, num_other = len(plain[-1]), example.completions[1].num_scored
        dpo = -F.logsigmoid(0.1 * ((w - ref_w) - (other - ref_other)))
        squared = ((w - ref_w) / num_w - (other - ref_other) / num_other - 5) ** 2
        expected.append(dpo + 0.02 * squared - 0.5 * plain[-1].mean())
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(
        output.metrics["loss"].values, torch.stack(expected).detach(), rtol=1e-6, atol=1e-6
    )
    by_hands = torch.cat([p.grad.flatten() for p in plain_policy.parameters()])
    assert (gradient - by_hands).norm() <= 1e-6 * by_hands.norm()
    torch.testing.assert_close(
        output.metrics["logps/chosen"].values, torch.stack([p.detach().sum() for p in plain])
    )


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_is_off_to_the_bit_and_zero_keeps_the_shared_tokens(name):
    policy = PolicyModel(tiny_model())
    choose_layout(policy, name, "auto", longest=64)
    off = pair_logps(policy, build_layout(EXAMPLES, Layout(name)))
    assert off.weighted is None
    layout = build_layout(EXAMPLES, Layout(name, ld_alpha=0.0))
    zero = pair_logps(policy, layout)
    assert torch.equal(zero.sums, off.sums)
    per_row = zip(off.per_token[::2], off.per_token[1::2], strict=True)
    kept = [side[: min(map(len, sides))] for sides in per_row for side in sides]
    assert any(len(few) < len(all_) for few, all_ in zip(kept, off.per_token, strict=True))
    torch.testing.assert_close(zero.weighted, torch.stack([k.double().sum() for k in kept]))
    ones = [replace(b, weights=torch.ones_like(b.weights)) for b in layout.blocks]
    one = pair_logps(policy, replace(layout, blocks=tuple(ones)))
    assert torch.equal(one.weighted, off.sums)


def test_the_reference_is_scored_once_for_every_alpha(tmp_path):
    policy, _ = models()
    layout = Layout("concatenated")
    off = reference_sums(tmp_path, policy, EXAMPLES, layout)
    assert off.num_computed == 2 * len(EXAMPLES)
    for alpha in (0.0, ALPHA, 1.0):
        other = reference_sums(tmp_path, policy, EXAMPLES, replace(layout, ld_alpha=alpha))
        assert other.num_computed == 0
        assert torch.equal(other.sums, off.sums) == (alpha == 1)
        with torch.no_grad():
            sequences = pair_logps(policy, build_layout(EXAMPLES, replace(layout, ld_alpha=alpha)))
        logps = as_pairs(sequences, other.sums)
        # What is stored is float32.
        torch.testing.assert_close(logps.ref_chosen, logps.chosen, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logps.ref_rejected, logps.rejected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer_with_two_partners_is_stored_once_and_weighed_as_a_live_reference_weighs_it(
    tmp_path, name
):
    """Beside a short rival most of its tokens weigh alpha, beside a long one none do."""
    answer = Completion((7, 8, 9, 10, 11, 12))
    rivals = (Completion((20, 21)), Completion(tuple(range(20, 30))))
    roles = ("chosen", "rejected")
    rows = [
        TokenizedExample(f"r{n}", (5, 6), (answer, rival), roles, "s", 99)
        for n, rival in enumerate(rivals)
    ]
    policy = PolicyModel(tiny_model())
    choose_layout(policy, name, "auto", longest=64)
    layout = Layout(name, ld_alpha=ALPHA)
    stored = reference_sums(tmp_path, policy, rows, layout)
    assert stored.num_computed == 3
    assert stored.sums[0, 0] - stored.sums[1, 0] > 1
    live = LiveReference(policy, Runtime("fp32", 0), mixup_alpha=1.0, sync_steps=1)
    sums = live.logps(build_layout(rows, layout)).view(2, 2)
    torch.testing.assert_close(stored.sums, sums, rtol=1e-6, atol=1e-5)
