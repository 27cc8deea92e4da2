"""BCO against scalar arithmetic.

By hand, β = 0.1, μ = 0.9. First batch: a desirable completion with s = 2 and an undesirable one
with s = −1: m_D = 0.1 · 0.2 = 0.02, m_U = 0.1 · −0.1 = −0.01, δ = 0.005; values −logσ(0.195) =
0.6003927939 and −logσ(0.105) = 0.6420246729. Second batch: desirable completions alone, s = 4 and
2: m_D = 0.9 · 0.02 + 0.1 · 0.3 = 0.048, m_U stays −0.01, δ = 0.019; values −logσ(0.381) =
0.5206836076 and −logσ(0.181) = 0.6067367277.
"""

from dataclasses import replace

import mpmath
import pytest
import torch

from preftune.losses.bco import BCO
from tests.oracles import log_sigmoid


def means(rows, beta, momentum, before=(0.0, 0.0)):
    """m_D and m_U of a batch."""
    after = []
    for label, old in zip((True, False), before, strict=True):
        rewards = [beta * mpmath.mpf(row.logratio) for row in rows if row.is_desirable is label]
        now = mpmath.fsum(rewards) / len(rewards) if rewards else None
        after.append(old if now is None else momentum * old + (1 - momentum) * now)
    return after


def formulas(rows, beta, shift):
    """One a completion; δ is a constant to `diff`."""

    def of(row):
        sign = 1 if row.is_desirable else -1
        return lambda policy: -log_sigmoid(sign * (beta * (policy - row.reference) - shift))

    return [of(row) for row in rows]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("before", [None, (1.25, -0.75)], ids=["first", "later"])
def test_value_and_gradient(rows, beta, momentum, before, make_completions, check_each):
    running = None if before is None else torch.tensor(before, dtype=torch.float64)
    logps = replace(make_completions(rows), running=running)
    shift = mpmath.fsum(means(rows, beta, momentum, before or (0.0, 0.0))) / 2
    check_each(BCO(beta, momentum), logps, formulas(rows, beta, shift))


def test_two_batches_by_hand(completions, make_completions):
    """The second has one label: the other's mean stays."""
    loss, desirable = BCO(beta=0.1), completions["desirable"]
    undesirable = replace(completions["undesirable"], policy=-7.0)
    first = make_completions([desirable, undesirable], grad=True)
    result, running = loss(first), loss.next_running(first)
    assert result.values.tolist() == pytest.approx([0.6003927939, 0.6420246729], abs=1e-9)
    assert result.rewards.tolist() == pytest.approx([0.2, -0.1])
    assert result.baseline.item() == pytest.approx(0.005)
    assert running.tolist() == pytest.approx([0.02, -0.01])
    assert not running.requires_grad
    second = make_completions([replace(desirable, policy=-8.0), desirable], grad=True)
    second = replace(second, running=running)
    result = loss(second)
    assert result.values.tolist() == pytest.approx([0.5206836076, 0.6067367277], abs=1e-9)
    assert result.baseline.item() == pytest.approx(0.019)
    assert loss.next_running(second).tolist() == pytest.approx([0.048, -0.01])


@pytest.mark.parametrize(("name", "kept"), [("desirable", 1), ("undesirable", 0)])
@pytest.mark.parametrize("before", [None, (1.25, -0.75)], ids=["first", "later"])
def test_a_batch_without_a_label_leaves_its_mean(name, kept, before, completions, make_completions):
    """Bit for bit, and 0 where no batch came before."""
    running = None if before is None else torch.tensor(before, dtype=torch.float64)
    logps = replace(make_completions([completions[name]]), running=running)
    after = BCO(beta=0.1).next_running(logps)
    assert after[kept] == (before or (0.0, 0.0))[kept]
    assert after[1 - kept] != (before or (0.0, 0.0))[1 - kept]


def test_each_label_counts_once_however_many_there_are(completions, make_completions):
    """Three desirable completions and one undesirable: δ is between the labels' means."""
    rows = [completions[n] for n in ("desirable", "desirable", "desirable", "undesirable")]
    result = BCO(beta=0.1, bco_momentum=0.0)(make_completions(rows))
    assert result.baseline.item() == pytest.approx((0.2 - 0.3) / 2)


def test_the_mean_is_that_of_the_labels_own_rewards(completions, make_completions):
    """The first entry is m_D: swapping the labels swaps the entries."""
    rows = [completions[n] for n in ("desirable", "undesirable", "long")]
    swapped = [replace(row, is_desirable=not row.is_desirable) for row in rows]
    here, there = (BCO(beta=0.1).next_running(make_completions(batch)) for batch in (rows, swapped))
    assert torch.equal(here.flip(0), there)
