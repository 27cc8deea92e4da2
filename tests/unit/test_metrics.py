"""Running means add up however the things were dealt."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.metrics import MetricSums


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=5), min_size=1, max_size=6))
def test_the_mean_is_over_things_not_over_parts(parts):
    sums = MetricSums()
    for part in parts:
        sums.add("x", torch.tensor(part, dtype=torch.float64).sum(), len(part))
    values = [v for part in parts for v in part]
    if not values:  # nothing was counted: no mean, and not 0
        assert sums.means(same) == {}
        return
    got = sums.means(same)["x"]
    assert abs(got - sum(values) / len(values)) <= 1e-6 * max(1.0, abs(got))


def test_counts_may_stay_on_the_device():
    sums = MetricSums()
    sums.add("x", torch.tensor(3.0), torch.tensor(2))
    sums.add("x", torch.tensor(1.0), 2)
    sums.add("none", torch.tensor(0.0), torch.tensor(0))
    assert sums.means(same) == {"x": 1.0}
    assert sums.snapshot(same) == {"x": [4.0, 4.0], "none": [0.0, 0.0]}


def test_a_snapshot_restores_the_same_bits():
    sums = MetricSums()
    sums.add("x", torch.tensor(1 / 3, dtype=torch.float64), 7)
    other = MetricSums()
    other.restore(sums.snapshot(same), torch.device("cpu"))
    assert other.means(same) == sums.means(same)
    assert other.snapshot(same) == sums.snapshot(same)


def test_ranks_add_sums_and_counts():
    sums = MetricSums()
    sums.add("x", 3.0, 1)
    assert sums.means(lambda t: t + torch.tensor([[7.0, 4.0]]))["x"] == 2.0


def test_one_rank_holds_the_window_for_all_after_a_resume():
    saved = {"x": [6.0, 4.0]}
    ranks = [MetricSums(), MetricSums()]
    for number, sums in enumerate(ranks):
        sums.restore(saved, torch.device("cpu"), is_main=number == 0)
        sums.add("x", 1.0, 1)
    packed = sum(torch.tensor(list(sums.snapshot(same).values())) for sums in ranks)
    assert packed.tolist() == [[8.0, 6.0]]


def test_a_window_that_is_not_kept_adds_neither_sums_nor_counts():
    window, bad, good = MetricSums(), MetricSums(), MetricSums()
    bad.add("loss", torch.tensor(float("nan")), 4)
    good.add("loss", torch.tensor(6.0), torch.tensor(3))
    window.add_all(bad, keep=torch.tensor(False))
    assert window.means(lambda x: x) == {}
    window.add_all(good, keep=torch.tensor(True))
    window.add_all(good)
    assert window.snapshot(lambda x: x) == {"loss": [12.0, 6.0]}
