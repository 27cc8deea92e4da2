"""The order of the data is a pure function of seed and step."""

from hypothesis import given
from hypothesis import strategies as st

from preftune.batching.sampler import PairSampler


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_an_epoch_deals_every_row_once(num_pairs, batch, seed, shuffle):
    sampler = PairSampler(num_pairs, batch, seed, shuffle)
    for epoch in (0, 1):
        first = epoch * sampler.steps_per_epoch
        dealt = [sampler.batch(first + s) for s in range(sampler.steps_per_epoch)]
        assert sorted(row for rows in dealt for row in rows) == list(range(num_pairs))
        assert all(len(rows) == batch for rows in dealt[:-1])
    assert sampler.epoch_at(sampler.steps_per_epoch) == 1.0


def test_epochs_and_seeds_differ_and_repeat():
    sampler = PairSampler(50, 50, seed=1)
    assert sampler.batch(0) != sampler.batch(1)
    assert sampler.batch(0) == PairSampler(50, 50, seed=1).batch(0)
    assert sampler.batch(0) != PairSampler(50, 50, seed=2).batch(0)


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = PairSampler(24, 4, seed=3), PairSampler(24, 8, seed=3)
    assert [r for s in range(6) for r in small.batch(s)] == [
        r for s in range(3) for r in large.batch(s)
    ]


def test_without_shuffling_the_order_is_the_datasets():
    assert PairSampler(5, 2, seed=0, shuffle=False).batch(2) == [4]
