"""What evaluation says beside the loss, worked out by hand."""

import pytest
import torch

from preftune.evaluation.held_out import length_metrics


def of(pairs: list[tuple[float, float, int, int]]) -> dict[str, float]:
    chosen, rejected, chosen_length, rejected_length = zip(*pairs, strict=True)
    return length_metrics(
        torch.tensor(chosen).double(),
        torch.tensor(rejected).double(),
        torch.tensor(chosen_length),
        torch.tensor(rejected_length),
    )


def test_by_hand():
    """Lengths 20/18 and 18/20 differ by 10 % of the longer, 20/17 and 4/5 by more.

    Rewards 1, -1, 2, 0 and 0, 1, 1, 0 at lengths 20, 18, 20, 4 and 18, 20, 17, 5: deviations from
    the means 0.5 and 15.25, products summed 18.0; squares 6.0 and 317.5.
    """
    found = of([(1, 0, 20, 18), (-1, 1, 18, 20), (2, 1, 20, 17), (0, 0, 4, 5)])
    assert found == {
        "rewards/length_matched": 0.5,
        "rewards/accuracies_length_matched": 0.5,
        "rewards/length_correlation": pytest.approx(18.0 / (6.0 * 317.5) ** 0.5),
    }


def test_what_is_not_defined_is_left_out():
    assert of([(1, 0, 9, 3)]) == {
        "rewards/length_matched": 0.0,
        "rewards/length_correlation": pytest.approx(1.0),
    }
    assert set(of([(1, 0, 9, 9)])) == {
        "rewards/length_matched",
        "rewards/accuracies_length_matched",
    }
    assert "rewards/length_correlation" not in of([(1, 1, 9, 3)])
