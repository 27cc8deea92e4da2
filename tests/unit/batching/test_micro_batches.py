"""Micro-batches are pure functions of lengths: nothing is lost, budgets hold, prompts meet."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout, build_layout
from preftune.batching.micro_batches import (
    MicroBatching,
    RowSizes,
    deal,
    num_positions,
    sorted_batches,
)
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
    most = math.ceil(len(batch) / world)
    assert {len(share) for share in shares} == {math.ceil(most / rows)}
    assert all(len(mb) <= rows for share in shares for mb in share)
    assert all(sum(map(len, share)) <= most for share in shares)


@given(sizes(), st.sampled_from(LAYOUTS), st.integers(2, 300), st.integers(1, 4))
def test_a_budget_holds_and_ranks_differ_by_one_row_at_most(sizes, layout, budget, world):
    packed = MicroBatching(sizes, layout, 1, budget)
    batch = list(range(len(sizes)))
    shares = [packed.split(batch, rank, world) for rank in range(world)]
    assert Counter(r for share in shares for mb in share for r in mb) == Counter(batch)
    assert len({len(share) for share in shares}) == 1
    for share in shares:
        for mb in share:
            assert len(mb) <= 1 or num_positions(mb, sizes, layout) <= budget
        positions = [num_positions(mb, sizes, layout) for mb in share]
        assert world == 1 or positions == sorted(positions, reverse=True)
    alone = [num_positions([row], sizes, layout) for row in batch]
    loads = [sum(alone[r] for mb in share for r in mb) for share in shares]
    assert max(loads) - min(loads) <= max(alone)


@given(sizes(), st.sampled_from(LAYOUTS), st.integers(1, 9), st.permutations(range(9)))
def test_one_rank_takes_the_batch_as_it_comes(sizes, layout, rows, order):
    batch = [row for row in order if row < len(sizes)]
    cut = [batch[i : i + rows] for i in range(0, len(batch), rows)]
    assert MicroBatching(sizes, layout, rows).split(batch) == cut


def test_the_costliest_row_is_dealt_first_to_the_rank_with_least():
    # Rows of 9, 3, 8, 4, 5 and 1 positions: 9 | 8; 9 | 8 5; 9 4 | 8 5; 9 4 3 | 8 5; 9 4 3 | 8 5 1.
    lengths = np.array([[1, 4, 4], [1, 1, 1], [1, 4, 3], [1, 2, 1], [1, 2, 2], [1, 0, 0]])
    sizes = RowSizes(np.arange(6, dtype=np.uint64), lengths)
    batch = [5, 0, 1, 2, 3, 4]
    assert deal(batch, sizes, "shared_prefix", 2) == [[0, 1, 3], [5, 2, 4]]
    # At most three rows a rank: 9 1 1 | 7 5 .
    assert deal([0, 5, 5, 5, 5], sizes, "shared_prefix", 2) == [[0], [5, 5, 5, 5]]
    assert deal([0, 5, 5, 5, 5], sizes, "shared_prefix", 2, 3) == [[0, 5], [5, 5, 5]]
    assert deal([0], sizes, "shared_prefix", 3) == [[0], [], []]


@pytest.mark.parametrize(("budget", "idle"), [(None, 0.07), (4096, 0.02)])
def test_ranks_idle_less_than_with_every_nth_row(budget, idle):
    """Lengths as of chats; 8 ranks, 64 pairs a step: the share of tokens that ranks wait for."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal([[4.5, 5, 5]], 0.8, size=(1280, 3)).astype(np.int64) + 1
    sizes = RowSizes(np.arange(1280, dtype=np.uint64), lengths)
    batching = MicroBatching(sizes, "shared_prefix", 8, budget)
    old, new = [], []
    for start in range(0, 1280, 64):
        batch = range(start, start + 64)
        shares = [batching.split(batch, rank, 8) for rank in range(8)]
        for waits, dealt in (
            (new, [[r for mb in share for r in mb] for share in shares]),
            (old, [batch[rank::8] for rank in range(8)]),
        ):
            loads = [lengths[rows].sum() for rows in dealt]
            waits.append(1 - np.mean(loads) / max(loads))
    assert np.mean(new) < idle < 0.2 < np.mean(old)


@given(sizes(max_rows=12), st.integers(20, 300), st.integers(1, 3), st.randoms())
def test_micro_batches_know_where_their_rows_stand_in_the_batch(sizes, budget, world, random):
    batch = random.sample(range(len(sizes)), len(sizes))
    batcher = RowBatcher(make_examples(12), None, Layout("separate"), torch.device("cpu"))
    for rank in range(world):
        for rows in MicroBatching(sizes, "separate", 1, budget).split(batch, rank, world):
            slots = batcher(rows, batch).slots
            assert slots is not None
            assert [batch[slot] for slot in slots.tolist()] == rows


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
    assert batching.heaviest([[0, 1, 2, 3], [4, 5, 6, 7]], rank=0, world_size=2) == [5, 7]
