"""EXO against scalar arithmetic.

By hand, z = 0.1 · 3 and ε = 0.1, where σ(z) = 0.5744425168, logσ(z) = −0.5543552445 and
logσ(−z) = −0.8543552445:
0.5744425168 · (−0.5543552445 + 0.1053605157) + 0.4255574832 · (−0.8543552445 + 2.3025850930)
= −0.2579216825 + 0.6163051006 = 0.3583833874.
"""

import mpmath
import pytest

from preftune.losses.exo_pair import EXOPair
from tests.oracles import divergence_score, log_sigmoid, logratios, sigmoid


def formula(pair, beta, eps, divergence):
    def value(chosen, rejected):
        w, r = (divergence_score(s, divergence, 0.5) for s in logratios(pair, chosen, rejected))
        z, label = beta * (w - r), (1 - mpmath.mpf(eps), mpmath.mpf(eps))
        implied = [(sigmoid(z), log_sigmoid(z)), (sigmoid(-z), log_sigmoid(-z))]
        return sum(
            q * (log_q - mpmath.log(p)) for (q, log_q), p in zip(implied, label, strict=True)
        )

    return value


@pytest.mark.parametrize("eps", [1e-3, 0.1, 0.49])
@pytest.mark.parametrize(("beta", "divergence"), [(0.1, "reverse_kl"), (2.5, "js")])
def test_value_and_gradient(pair, beta, eps, divergence, check_formula):
    loss = EXOPair(beta=beta, label_smoothing=eps, f_divergence=divergence)
    check_formula(loss, pair, formula(pair, beta, eps, divergence))


@pytest.mark.parametrize(
    ("knobs", "expected"), [({"beta": 0.1, "label_smoothing": 0.1}, 0.3583833874)]
)
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = EXOPair(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β (π − ρ): 0.5 · 2 and 0.5 · −1."""
    result = EXOPair()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(1.0)
    assert result.rejected_rewards.item() == pytest.approx(-0.5)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_smoothing_0_is_refused_as_its_logarithm_is_infinite():
    message = "label_smoothing is 0.0; it must be a finite number above 0 and below 0.5"
    with pytest.raises(ValueError, match=message):
        EXOPair(label_smoothing=0.0)


def test_least_and_0_where_the_policy_implies_the_label(pairs, make_batch):
    """log((1−ε)/ε) = log 3 at ε = ¼; the margin is 3, so β = log(3)/3."""
    loss = EXOPair(beta=float(mpmath.log(3) / 3), label_smoothing=0.25)
    logps = make_batch([pairs["preferred"]], grad=True)
    value = loss(logps).values.sum()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert logps.chosen.grad.item() == pytest.approx(0, abs=1e-12)
