"""A packed row's spans as the arrays that kernels read: pure functions of `Segments`, on the CPU.

Kernels for rows of many lengths want offsets and an index of keys; kernels with a mask want to know
of every token where it belongs, and of every block of the scores whether anything in it is seen.
All of it follows from the spans, so that what a GPU computes is proved on a CPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from preftune.batching.layout import Segments, Span


@dataclass(frozen=True)
class VarlenArrays:
    """Spans as sequences of their own: queries lie in the row, keys are gathered from it.

    Example: spans `(0, 4, 0, 0), (4, 5, 0, 2)`:

        cu_seqlens_q  [0, 4, 5]
        cu_seqlens_k  [0, 4, 7]
        kv_index      [0, 1, 2, 3,  0, 1, 4]     # the second span's prefix, then its own token
        max_q, max_k  4, 4
    """

    cu_seqlens_q: Int[Tensor, " offsets"]
    cu_seqlens_k: Int[Tensor, " offsets"]
    kv_index: Int[Tensor, " keys"]
    """Token of each key: prefix and own tokens, span after span."""
    max_q: int
    """Most queries of a span, on the host: kernels are launched by it."""
    max_k: int


def varlen_arrays(segments: Segments) -> VarlenArrays:
    """Offsets and key index of a packed row."""
    queries = [span.stop - span.start for span in segments.spans]
    keys = [
        own + span.prefix_stop - span.prefix_start
        for own, span in zip(queries, segments.spans, strict=True)
    ]
    index = [
        np.arange(start, stop)
        for span in segments.spans
        for start, stop in ((span.prefix_start, span.prefix_stop), (span.start, span.stop))
    ]
    return VarlenArrays(
        torch.tensor([0, *np.cumsum(queries)], dtype=torch.int32),
        torch.tensor([0, *np.cumsum(keys)], dtype=torch.int32),
        torch.from_numpy(np.concatenate(index)),
        max(queries),
        max(keys),
    )


@dataclass(frozen=True)
class TokenArrays:
    """Of every token of a packed row: where it belongs and what it sees."""

    span: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    """In the sequence `prefix + span`."""
    prefix_start: Int[Tensor, " tokens"]
    prefix_stop: Int[Tensor, " tokens"]


def token_arrays(segments: Segments) -> TokenArrays:
    """Per-token arrays of a packed row, views of one tensor."""
    rows = np.empty((4, segments.spans[-1].stop), dtype=np.int32)
    for number, (start, stop, prefix_start, prefix_stop) in enumerate(segments.spans):
        prefix = prefix_stop - prefix_start
        rows[0, start:stop] = number
        rows[1, start:stop] = np.arange(prefix, prefix + stop - start)
        rows[2, start:stop] = prefix_start
        rows[3, start:stop] = prefix_stop
    return TokenArrays(*torch.from_numpy(rows))


@dataclass(frozen=True)
class BlockArrays:
    """Which blocks of the matrix of scores hold anything: all others are never computed.

    Rows are blocks of queries, columns blocks of keys; no block is both.
    """

    partial: Bool[Tensor, "blocks blocks"]
    """Some query sees some key: the mask is asked for each pair."""
    full: Bool[Tensor, "blocks blocks"]
    """Every query sees every key: no mask is needed."""


def block_arrays(segments: Segments, block_size: int, window: int | None) -> BlockArrays:
    """Blocks of `block_size` tokens that are seen, from the spans alone.

    The queries of one span that lie in one block see a run of the prefix and a run of the span.
    What any of them sees begins where the first one's view begins and ends with the last one; what
    all of them see begins with the last one's view and ends with the first one. A block of keys is
    seen whole by as many queries as the spans in a block of queries add up to.
    """
    blocks = -(-segments.spans[-1].stop // block_size)
    some = np.zeros((blocks, blocks), dtype=bool)
    queries_of_whole = np.zeros((blocks, blocks), dtype=np.int64)
    for span in segments.spans:
        for row in range(span.start // block_size, -(-span.stop // block_size)):
            first = max(span.start, row * block_size)
            last = min(span.stop, (row + 1) * block_size) - 1
            for begin, end in _seen(span, first, last, window):
                some[row, begin // block_size : -(-end // block_size)] |= begin < end
            for begin, end in _seen(span, last, first, window):
                whole = slice(-(-begin // block_size), end // block_size)
                queries_of_whole[row, whole] += last + 1 - first
    full = queries_of_whole == block_size
    return BlockArrays(torch.from_numpy(some & ~full), torch.from_numpy(full))


def _seen(span: Span, begin_of: int, end_of: int, window: int | None) -> list[tuple[int, int]]:
    """Keys in prefix and span, from the first that query `begin_of` sees to token `end_of`."""
    prefix = span.prefix_stop - span.prefix_start
    position = prefix + begin_of - span.start
    lowest = 0 if window is None else max(0, position - window + 1)
    return [
        (span.prefix_start + min(lowest, prefix), span.prefix_stop),
        (span.start + max(lowest - prefix, 0), end_of + 1),
    ]
