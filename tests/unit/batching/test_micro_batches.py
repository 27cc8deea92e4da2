"""Micro-batches are pure functions of lengths: nothing is lost, budgets hold, prompts meet."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.batching.layout import build_layout
from preftune.batching.micro_batches import MicroBatching, RowSizes, num_positions, sorted_batches
from tests.examples import make_examples

LAYOUTS = ("shared_prefix", "concatenated", "separate")


@st.composite
def sizes(draw, max_rows=30):
    """Pairs whose prompts are a few ones, so that many rows share one."""
    prompts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    rows = draw(
        st.lists(
            st.tuples(st.integers(0, len(prompts) - 1), st.integers(1, 50), st.integers(1, 50)),
            min_size=1,
            max_size=max_rows,
        )
    )
    keys = np.array([key for key, *_ in rows], dtype=np.uint64)
    return RowSizes(keys, np.array([[prompts[key], *answers] for key, *answers in rows]))


@given(sizes(), st.sampled_from(LAYOUTS), st.integers(1, 9), st.integers(1, 4))
def test_ranks_share_a_batch_and_make_equally_many_micro_batches(sizes, layout, rows, world):
    batching = MicroBatching(sizes, layout, rows)
    batch = list(range(len(sizes)))
    shares = [batching.split(batch, rank, world) for rank in range(world)]
    assert Counter(r for share in shares for mb in share for r in mb) == Counter(batch)
    assert len({len(share) for share in shares}) == 1
    assert all(len(mb) <= rows for share in shares for mb in share)


@given(sizes(), st.sampled_from(LAYOUTS), st.integers(2, 300), st.integers(1, 4))
def test_a_budget_holds_and_ranks_keep_their_rows(sizes, layout, budget, world):
    packed = MicroBatching(sizes, layout, 1, budget)
    batch = list(range(len(sizes)))
    shares = [packed.split(batch, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    for rank, share in enumerate(shares):
        assert sorted(r for mb in share for r in mb) == batch[rank::world]
        for mb in share:
            assert len(mb) <= 1 or num_positions(mb, sizes, layout) <= budget


def test_first_fit_needs_few_micro_batches_and_lets_prompts_meet():
    # Rows of 60, 50, 40 and 30 tokens into two of 90; and two rows of one prompt together, though
    # an earlier micro-batch has room for the second of them.
    lengths = np.array([[10, 25, 25], [10, 20, 20], [10, 15, 15], [10, 10, 10]])
    sizes = RowSizes(np.arange(4, dtype=np.uint64), lengths)
    assert MicroBatching(sizes, "shared_prefix", 1, 90).split([0, 1, 2, 3]) == [[0, 3], [1, 2]]
    twins = RowSizes(
        np.array([0, 1, 1], dtype=np.uint64), np.array([[40, 25, 25], [30, 30, 30], [30, 5, 5]])
    )
    assert MicroBatching(twins, "shared_prefix", 1, 160).split([0, 1, 2]) == [[0], [1, 2]]


@given(
    sizes(),
    st.sampled_from(LAYOUTS),
    st.one_of(st.none(), st.integers(1, 8)),
    st.one_of(st.none(), st.integers(2, 400)),
)
def test_sorted_batches_hold_every_row_once_within_both_bounds(sizes, layout, rows, budget):
    batches = sorted_batches(sizes, layout, rows=rows, max_tokens=budget)
    assert Counter(r for b in batches for r in b) == Counter(range(len(sizes)))
    for batch in batches:
        assert rows is None or len(batch) <= rows
        assert budget is None or len(batch) == 1 or num_positions(batch, sizes, layout) <= budget


def test_sorted_batches_go_from_long_to_short_and_keep_prompts_together():
    lengths = np.array([[1, 1, 1], [1, 5, 2], [1, 3, 3], [1, 2, 5]])
    sizes = RowSizes(np.array([7, 8, 9, 7], dtype=np.uint64), lengths)
    assert sorted_batches(sizes, "concatenated", rows=2) == [[1, 3], [2, 0]]
    assert sorted_batches(sizes, "shared_prefix", rows=2) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_those_that_the_layout_computes(layout):
    examples = make_examples(7, seed=2)
    examples.append(examples[0])  # one prompt twice
    sizes = RowSizes.of(examples)
    computed = sum(block.input_ids.numel() for block in build_layout(examples, layout).blocks)
    assert num_positions(range(len(sizes)), sizes, layout) == computed


def test_the_heaviest_micro_batch_is_found_wherever_it_comes():
    lengths = np.array([[1, 1, 1]] * 5 + [[9, 9, 9]] + [[1, 1, 1]] * 2)
    batching = MicroBatching(RowSizes(np.arange(8, dtype=np.uint64), lengths), "shared_prefix", 2)
    assert batching.heaviest([[0, 1, 2, 3], [4, 5, 6, 7]]) == [4, 5]
    assert batching.heaviest([[0, 1, 2, 3], [4, 5, 6, 7]], rank=1, world_size=2) == [5, 7]
