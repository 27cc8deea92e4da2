"""rDPO against scalar arithmetic.

By hand, z = 0.1 · 3 and ε = 0.1, from test_dpo's 0.5543552445 and 0.8543552445:
(0.9 · 0.5543552445 − 0.1 · 0.8543552445)/0.8 = 0.5168552445; with ε = 0 DPO's own.
"""

import mpmath
import pytest

from preftune.losses.robust import Robust
from tests.oracles import divergence_score, log_sigmoid, logratios


def formula(pair, beta, eps, divergence):
    def value(chosen, rejected):
        w, r = (divergence_score(s, divergence, 0.5) for s in logratios(pair, chosen, rejected))
        z = beta * (w - r)
        return (-(1 - eps) * log_sigmoid(z) + eps * log_sigmoid(-z)) / (1 - 2 * mpmath.mpf(eps))

    return value


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
@pytest.mark.parametrize(("beta", "divergence"), [(0.1, "reverse_kl"), (2.5, "js")])
def test_value_and_gradient(pair, beta, eps, divergence, check_formula):
    loss = Robust(beta=beta, label_smoothing=eps, f_divergence=divergence)
    check_formula(loss, pair, formula(pair, beta, eps, divergence))


@pytest.mark.parametrize(
    ("knobs", "expected"), [({}, 0.5168552445), ({"label_smoothing": 0.0}, 0.5543552445)]
)
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = Robust(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.1 · 2 and 0.1 · −1."""
    result = Robust()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_the_mean_over_swapped_labels_is_that_of_dpo(pairs, make_batch):
    """What makes it unbiased: 0.9 · ℓ(w, l) + 0.1 · ℓ(l, w) is DPO's loss of the true order."""
    pair = pairs["preferred"]
    swapped = type(pair)(pair.rejected, pair.chosen, pair.ref_rejected, pair.ref_chosen)
    right, wrong = Robust()(make_batch([pair, swapped])).values.tolist()
    assert 0.9 * right + 0.1 * wrong == pytest.approx(0.5543552445, abs=1e-10)
