"""KTO against scalar arithmetic.

By hand, β = 0.1, both labels. Mismatched log-ratios 1.5 and −0.5: z = 0.5. Desirable, s = 2:
1 − σ(0.1 · 1.5) = 0.4625701547; undesirable, s = −3: 1 − σ(0.1 · 3.5) = 0.4133824211. With
mismatched log-ratios −2.25 and −0.5 the mean is below 0, z = 0: 1 − σ(0.2) = 0.4501660027 and
1 − σ(0.3) = 0.4255574832.
"""

from dataclasses import replace

import mpmath
import pytest

from preftune.losses.kto import KTO
from tests.oracles import sigmoid


def formulas(rows, beta, desirable=1.0, undesirable=1.0):
    """One a completion; z is worked out from the plain numbers: a constant to `diff`."""
    mean = mpmath.fsum(row.mismatched_logratio for row in rows) / len(rows)
    z = max(mpmath.mpf(0), mean)

    def of(row):
        if row.is_desirable:
            return lambda policy: desirable * (1 - sigmoid(beta * (policy - row.reference - z)))
        return lambda policy: undesirable * (1 - sigmoid(beta * (z - (policy - row.reference))))

    return [of(row) for row in rows]


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.25)])
def test_value_and_gradient(rows, beta, weights, make_completions, check_each):
    loss = KTO(beta, *weights)
    check_each(loss, make_completions(rows), formulas(rows, beta, *weights))


@pytest.mark.parametrize(
    ("mismatched", "baseline", "expected"),
    [
        ((1.5, -0.5), 0.05, [0.4625701547, 0.4133824211]),
        ((-2.25, -0.5), 0.0, [0.4501660027, 0.4255574832]),
    ],
    ids=["above_0", "clamped"],
)
def test_constants_by_hand(mismatched, baseline, expected, completions, make_completions):
    rows = [completions[name] for name in ("desirable", "undesirable")]
    both = zip(rows, mismatched, strict=True)
    rows = [replace(row, mismatched=row.mismatched_reference + ratio) for row, ratio in both]
    result = KTO()(make_completions(rows, grad=True))
    assert result.values.tolist() == pytest.approx(expected, abs=1e-9)
    assert result.rewards.tolist() == pytest.approx([0.2, -0.3])
    assert result.baseline.item() == pytest.approx(baseline)


def test_the_example_of_the_docstring(completions, make_completions):
    row = replace(completions["desirable"], mismatched=-21.0)
    assert KTO()(make_completions([row])).values.item() == pytest.approx(0.4625701547, abs=1e-9)


def test_the_value_at_the_reference_counts_the_labels(completions_at_reference):
    """(1.5 · 2 + 0.25 · 1) / (2 · 3)."""
    loss = KTO(desirable_weight=1.5, undesirable_weight=0.25)
    assert loss.value_at_reference(completions_at_reference) == pytest.approx(3.25 / 6)


def test_the_baseline_is_of_the_whole_batch(completions, make_completions):
    """Not of each label by itself: a batch of one label takes its z from that label."""
    rows = [completions[n] for n in ("desirable", "undesirable_up", "undesirable")]
    assert KTO()(make_completions(rows)).baseline.item() == pytest.approx(0.1 * 4 / 3)
    assert KTO()(make_completions(rows[:1])).baseline.item() == pytest.approx(0.15)
