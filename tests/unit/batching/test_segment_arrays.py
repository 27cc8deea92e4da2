"""Arrays of a packed row against its spans, token by token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.batching.layout import Segments, Span
from preftune.batching.segment_arrays import block_arrays, token_arrays, varlen_arrays


@st.composite
def any_spans(draw: st.DrawFn) -> tuple[Span, ...]:
    """Spans with any run of earlier tokens as their prefix."""
    spans: list[Span] = []
    at = 0
    for _ in range(draw(st.integers(1, 6))):
        stop = at + draw(st.integers(1, 25))
        prefix_start = draw(st.integers(0, at))
        spans.append(Span(at, stop, prefix_start, draw(st.integers(prefix_start, at))))
        at = stop
    return tuple(spans)


def sequence(span: Span) -> list[int]:
    return [*range(span.prefix_start, span.prefix_stop), *range(span.start, span.stop)]


def seen(segments: Segments, window: int | None) -> torch.Tensor:
    """(tokens, tokens) True where a token sees another, as `Span` defines it."""
    matrix = torch.zeros(segments.spans[-1].stop, segments.spans[-1].stop, dtype=torch.bool)
    for span in segments.spans:
        tokens = sequence(span)
        for position in range(span.prefix_stop - span.prefix_start, len(tokens)):
            first = 0 if window is None else max(0, position - window + 1)
            matrix[tokens[position], tokens[first : position + 1]] = True
    return matrix


def test_the_arrays_that_the_docstring_shows() -> None:
    arrays = varlen_arrays(Segments((Span(0, 4, 0, 0), Span(4, 5, 0, 2))))
    assert arrays.cu_seqlens_q.tolist() == [0, 4, 5]
    assert arrays.cu_seqlens_k.tolist() == [0, 4, 7]
    assert arrays.kv_index.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert (arrays.max_q, arrays.max_k) == (4, 4)


@settings(max_examples=100, deadline=None)
@given(spans=any_spans())
def test_offsets_cut_the_row_into_its_sequences(spans: tuple[Span, ...]) -> None:
    segments = Segments(spans)
    arrays = varlen_arrays(segments)
    keys = arrays.kv_index.tensor_split(arrays.cu_seqlens_k[1:-1].long())
    assert [part.tolist() for part in keys] == [sequence(span) for span in segments.spans]
    assert arrays.cu_seqlens_q.tolist() == [0, *(span.stop for span in segments.spans)]
    assert arrays.cu_seqlens_q.dtype == arrays.cu_seqlens_k.dtype == torch.int32
    # The host must know them without asking the device.
    assert type(arrays.max_q) is type(arrays.max_k) is int
    assert arrays.max_q == max(span.stop - span.start for span in segments.spans)
    assert arrays.max_k == max(len(sequence(span)) for span in segments.spans)


@settings(max_examples=100, deadline=None)
@given(spans=any_spans())
def test_tokens_know_their_place(spans: tuple[Span, ...]) -> None:
    segments = Segments(spans)
    arrays = token_arrays(segments)
    for number, span in enumerate(segments.spans):
        for token in range(span.start, span.stop):
            assert arrays.span[token] == number
            assert sequence(span)[int(arrays.position[token])] == token
            assert arrays.prefix_start[token] == span.prefix_start
            assert arrays.prefix_stop[token] == span.prefix_stop


@settings(max_examples=200, deadline=None)
@given(
    spans=any_spans(),
    block_size=st.integers(1, 9),
    window=st.none() | st.integers(1, 30),
)
def test_blocks_are_those_of_the_whole_matrix(
    spans: tuple[Span, ...], block_size: int, window: int | None
) -> None:
    segments = Segments(spans)
    length = segments.spans[-1].stop
    blocks = -(-length // block_size)
    padded = torch.zeros(blocks * block_size, blocks * block_size, dtype=torch.bool)
    padded[:length, :length] = seen(segments, window)
    tiles = padded.view(blocks, block_size, blocks, block_size).transpose(1, 2).flatten(2)
    arrays = block_arrays(segments, block_size, window)
    assert torch.equal(arrays.partial | arrays.full, tiles.any(-1))
    assert not (arrays.partial & arrays.full).any()
    assert not (arrays.full & ~tiles.all(-1)).any()
    # A block that lies across the end of a prefix and the span right behind it counts as partial.
    if all(s.prefix_stop < s.start or s.prefix_start == s.prefix_stop for s in spans):
        assert torch.equal(arrays.full, tiles.all(-1))
