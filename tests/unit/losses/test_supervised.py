"""The negative log-likelihood, by hand."""

import math

import pytest
import torch

from preftune.losses import AnswerLogps, NegativeLogLikelihood
from preftune.objective import AnswerObjective


def test_tokens_count_the_same_whichever_row_they_stand_in():
    """Answers of 1 and 3 tokens, of probability 1/2 and 1/4 each: (ln 2 + 3 ln 4) / 4."""
    policy = -torch.tensor([math.log(2), 3 * math.log(4)], dtype=torch.float64)
    logps = AnswerLogps(policy, torch.tensor([1, 3]))
    output = AnswerObjective(NegativeLogLikelihood()).output(logps)
    assert float(output.loss_sum) == pytest.approx(7 * math.log(2))
    means = {name: float(m.total / m.count) for name, m in output.metrics.items()}
    assert means == pytest.approx(dict.fromkeys(("loss", "nll"), 7 / 4 * math.log(2)))


def test_a_weight_is_a_factor_of_the_loss_and_no_part_of_perplexity():
    logps = AnswerLogps(torch.tensor([-2.0, -6.0]), torch.tensor([2, 2]), torch.tensor([0.5, 0.0]))
    objective = AnswerObjective(NegativeLogLikelihood())
    metrics = objective.output(logps).metrics
    means = {name: float(m.total / m.count) for name, m in metrics.items()}
    assert means == {"loss": 0.25, "nll": 2.0}
    assert objective.summary(means) == {"loss": 0.25, "perplexity": math.exp(2)}
    assert objective.summary({"loss": 1e4, "nll": 1e4}) == {"loss": 1e4}  # e^1e4 is no float
