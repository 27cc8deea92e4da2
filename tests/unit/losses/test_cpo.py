"""CPO against scalar arithmetic.

By hand, −10 and −9, β = 0.1: softplus(0.1) = 0.7443966600, and 10, or 10/4 with the mean; with
ε = 0.1, 0.9 · 0.7443966600 + 0.1 · 0.6443966600 = 0.7343966600.
"""

import pytest

from preftune.losses.cpo import CPO
from tests.oracles import log_sigmoid


def formula(pair, beta, eps, alpha, nll):
    def value(chosen, rejected):
        z = beta * (chosen - rejected)
        tokens = pair.chosen_length if nll == "mean" else 1
        return -(1 - eps) * log_sigmoid(z) - eps * log_sigmoid(-z) - alpha * chosen / tokens

    return value


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize(("alpha", "nll"), [(0.0, "sum"), (1.0, "sum"), (0.5, "mean")])
def test_value_and_gradient(pair, beta, eps, alpha, nll, check_formula):
    loss = CPO(beta=beta, label_smoothing=eps, cpo_alpha=alpha, cpo_nll=nll)
    check_formula(loss, pair, formula(pair, beta, eps, alpha, nll))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, 10.7443966600),
        ({"cpo_nll": "mean"}, 3.2443966600),
        ({"cpo_nll": "token"}, 3.2443966600),
        ({"cpo_alpha": 0.0, "label_smoothing": 0.1}, 0.7343966600),
    ],
)
def test_constant_by_hand(knobs, expected, pairs, make_batch):
    result = CPO(**knobs)(make_batch([pairs["preferred"]]))
    assert result.values.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_by_hand(pairs, make_batch):
    """β π: 0.1 · −10 and 0.1 · −9."""
    result = CPO()(make_batch([pairs["preferred"]], grad=True))
    assert result.chosen_rewards.item() == pytest.approx(-1.0)
    assert result.rejected_rewards.item() == pytest.approx(-0.9)
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
