"""Layouts are plain index arithmetic: checked against the sequences they were made from."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.batching.layout import Layout, LengthLimits, build_layout
from preftune.schema import Completion, TokenizedExample
from tests.examples import make_examples


def pair(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]):
    completions = (Completion(chosen), Completion(rejected))
    return TokenizedExample("r", prompt, completions, ("chosen", "rejected"), "s", 0)


def test_the_docstrings_example():
    layout = build_layout([pair((5, 6), (7, 8), (9,))], "concatenated")
    (block,) = layout.blocks
    assert block.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0]]
    assert block.score_positions.tolist() == [1, 2, 5]
    assert block.labels.tolist() == [7, 8, 9]
    assert block.lengths.tolist() == [2, 1]
    assert block.completion_ids == (0, 1)
    assert layout.num_tokens == 7


def test_unscored_tokens_are_read_by_nobody():
    completion = Completion((7, 8, 9), scored=(True, False, True))
    example = TokenizedExample("r", (5,), (completion,), ("chosen",), "s", 0)
    (block,) = build_layout([example], "concatenated").blocks
    assert block.labels.tolist() == [7, 9]
    assert block.score_positions.tolist() == [0, 2]


def test_separate_makes_one_block_a_side():
    layout = build_layout(make_examples(3), "separate")
    assert [block.completion_ids for block in layout.blocks] == [(0, 2, 4), (1, 3, 5)]


def test_lengths_on_both_sides_of_a_switch_never_share_a_block():
    rows = [pair((5, 6), (7, 8), (7, 8, 9)), pair((5, 6), (9, 9, 9, 9), (1,))]
    limits = LengthLimits(switches=(4,))
    layout = build_layout(rows, Layout("shared_prefix", limits))
    # The shared prompt is computed once on either side.
    assert [block.input_ids.tolist() for block in layout.blocks] == [
        [[5, 6, 7, 8, 1]],
        [[5, 6, 7, 8, 9, 9, 9, 9, 9]],
    ]
    assert [block.completion_ids for block in layout.blocks] == [(0, 3), (1, 2)]
    assert layout.num_tokens == 14
    padded = build_layout(rows, Layout("concatenated", limits))
    assert [tuple(block.input_ids.shape) for block in padded.blocks] == [(2, 4), (2, 6)]
    sides = build_layout(rows, Layout("separate", limits))
    assert [block.completion_ids for block in sides.blocks] == [(0,), (2,), (3,), (1,)]


def test_past_a_start_only_equal_lengths_share_a_block():
    rows = [
        pair((5,), (1, 2), (1, 2, 3)),
        pair((6,), (1, 2, 3, 4), (1,)),
        pair((7,), (4,) * 3, (5,) * 5),
    ]
    layout = build_layout(rows, Layout("concatenated", LengthLimits(start=3)))
    assert [block.completion_ids for block in layout.blocks] == [(0, 3), (1, 4), (2,), (5,)]


@given(st.integers(1, 6), st.integers(0, 99), st.sampled_from(["concatenated", "separate"]))
def test_every_scored_token_is_read_once_from_the_position_before_it(n, seed, name):
    examples = make_examples(n, seed)
    sequences = [(e.prompt_ids, c.ids) for e in examples for c in e.completions]
    layout = build_layout(examples, name)
    seen = {}
    for block in layout.blocks:
        flat = block.input_ids.flatten()
        width = block.input_ids.shape[1]
        starts = [0, *torch.tensor(block.num_scored).cumsum(0).tolist()]
        for row, completion in enumerate(block.completion_ids):
            span = slice(starts[row], starts[row + 1])
            seen[completion] = block.labels[span].tolist()
            positions = block.score_positions[span]
            assert set((positions // width).tolist()) == {row}
            assert flat[positions + 1].tolist() == seen[completion]
            assert positions[0] - row * width == len(sequences[completion][0]) - 1
    assert [tuple(seen[i]) for i in range(2 * n)] == [completion for _, completion in sequences]
    assert layout.num_tokens == sum(len(p) + len(c) for p, c in sequences)
