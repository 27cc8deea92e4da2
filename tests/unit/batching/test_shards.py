"""Every token of a packed row lies on exactly one of the processes that share it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.batching.layout import Layout, LengthLimits, build_layout
from preftune.batching.shards import RowPart, make_shard
from tests.examples import make_examples


def test_the_docstrings_example():
    row = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 2, 3, 2]])
    shard = make_shard(*row, torch.tensor([1, 2, 1]), RowPart(1, 2))
    assert shard.input_ids.tolist() == [[6, 8, 0]]
    assert shard.position_ids.tolist() == [[1, 3, 3]]
    assert shard.real.tolist() == [True, True, False]
    assert shard.score_positions.tolist() == [0, 0]
    assert shard.scored.tolist() == [0, 2]


@given(st.integers(1, 4), st.integers(0, 99), st.integers(1, 5), st.booleans())
def test_the_parts_make_the_row(n, seed, size, is_limited):
    examples = make_examples(n, seed)
    limits = LengthLimits(start=10_000) if is_limited else LengthLimits()
    (block,) = build_layout(examples, "shared_prefix").blocks
    shards = []
    for rank in range(size):
        layout = build_layout(examples, Layout("shared_prefix", limits, part=RowPart(rank, size)))
        shards.append(layout.blocks[0].shard)
        assert layout.num_tokens == block.input_ids.numel()
    width = block.input_ids.numel()
    for name in ("input_ids", "position_ids"):
        parts = torch.stack([getattr(shard, name)[0] for shard in shards], dim=1)
        assert torch.equal(parts.flatten()[:width], getattr(block, name)[0])
    real = torch.stack([shard.real for shard in shards], dim=1).flatten()
    assert real[:width].all()
    assert not real[width:].any()
    assert len(real) - width < size * (1 + is_limited)
    predicted = torch.cat([shard.scored for shard in shards])
    assert torch.equal(predicted.sort().values, torch.arange(len(block.labels)))
    ids = torch.cat([shard.input_ids[0, shard.score_positions] for shard in shards])
    before = block.input_ids[0, block.score_positions]
    assert torch.equal(ids, before[predicted])
    # Scored tokens come in runs of at most one a process more; here an answer is a run.
    counts = [len(shard.scored) for shard in shards]
    assert max(counts) - min(counts) <= 4 * n
    if is_limited:  # each rank sees the longest sequence
        assert {int(shard.position_ids.max()) for shard in shards} == {
            int(block.position_ids.max())
        }


def test_padded_rows_are_not_shared():
    layout = build_layout(make_examples(2), Layout("concatenated", part=RowPart(0, 2)))
    assert layout.blocks[0].shard is None
