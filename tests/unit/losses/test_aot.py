"""Both forms of AOT against scalar arithmetic, and against sorting in plain Python.

By hand, s_w = (2, −2.5), s_l = (−1, 2.25), β = 0.1. Unpaired: sorted −2.5, 2 against −1, 2.25, so
z = −0.15 and −0.025. Paired, with margins π_w − π_l = (−1, −4) and ρ_w − ρ_l = (−4, 0.75): −4, −1
against −4, 0.75, so z = 0 and −0.175.
"""

import mpmath
import pytest
import torch

from preftune.losses.aot import AOT
from preftune.losses.aot_unpaired import AOTUnpaired
from tests.oracles import log_sigmoid, logratios

both = pytest.mark.parametrize("cls", [AOT, AOTUnpaired])


@both
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_one_pair_is_dpo(cls, pair, beta, eps, check_formula):
    def value(chosen, rejected):
        w, r = logratios(pair, chosen, rejected)
        return -(1 - eps) * log_sigmoid(beta * (w - r)) - eps * log_sigmoid(-beta * (w - r))

    check_formula(cls(beta=beta, label_smoothing=eps), pair, value)


@pytest.mark.parametrize(("cls", "margins"), [(AOT, [-0.175, 0.0]), (AOTUnpaired, [-0.025, -0.15])])
def test_two_pairs_by_hand(cls, margins, pairs, make_batch):
    logps = make_batch([pairs["preferred"], pairs["not_preferred"]])
    expected = [float(-log_sigmoid(mpmath.mpf(z))) for z in margins]
    assert cls(beta=0.1)(logps).values.tolist() == pytest.approx(expected, rel=1e-9)


@both
def test_the_sum_and_its_gradient_are_those_of_sorted_lists(cls, pairs, make_batch):
    rows = list(pairs.values())
    logps = make_batch(rows, grad=True)
    values = cls(beta=0.01)(logps).values
    got = torch.autograd.grad(values.sum(), [logps.chosen, logps.rejected])
    if cls is AOT:
        above = [row.chosen - row.rejected for row in rows]
        below = [row.ref_chosen - row.ref_rejected for row in rows]
    else:
        above = [row.chosen - row.ref_chosen for row in rows]
        below = [row.rejected - row.ref_rejected for row in rows]
    z = [0.01 * (a - b) for a, b in zip(sorted(above), sorted(below), strict=True)]
    assert values.sum().item() == pytest.approx(float(-sum(map(log_sigmoid, z))), rel=1e-9)
    # dvalue/dabove of each rank; ties share a value, so their sum is compared through sorting.
    slopes = sorted(-0.01 / (1 + float(mpmath.exp(x))) for x in z)
    assert sorted(got[0].tolist()) == pytest.approx(slopes, rel=1e-9, abs=1e-15)
    assert sorted(got[1].neg().tolist()) == pytest.approx(slopes, rel=1e-9, abs=1e-15)


def test_unpaired_does_not_care_which_answers_are_pairs(pairs, make_batch):
    logps = make_batch(list(pairs.values()))
    moved = {k: getattr(logps, k).roll(2) for k in ("rejected", "ref_rejected")}
    loss = AOTUnpaired()
    other = type(logps)(**(vars(logps) | moved))
    torch.testing.assert_close(loss(other).values, loss(logps).values)
