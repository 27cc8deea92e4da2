"""Packed attention computed plainly, and kernels imitated: what tests on CPUs and GPUs share."""

import random
from typing import Any

import torch
from torch import Tensor

from preftune.batching.layout import Segments, Span
from preftune.model.attention_rules import ScoreRules


def rules(
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> ScoreRules:
    """Rules of a layer without sinks."""
    return ScoreRules(scale, dropout, window, softcap, None)


def make_segments(seed: int, prompts: int = 3, longest: int = 30) -> Segments:
    """Prompts with one to four answers each, of very different lengths, one token among them."""
    rng = random.Random(seed)

    def length() -> int:
        return rng.choice((1, rng.randint(1, 9), rng.randint(1, longest)))

    spans: list[Span] = []
    for _ in range(prompts):
        start = spans[-1].stop if spans else 0
        stop = start + length()
        spans.append(Span(start, stop + length(), start, start))
        for _ in range(rng.randint(0, 3)):
            begin = spans[-1].stop
            spans.append(Span(begin, begin + length(), start, stop))
    return Segments(tuple(spans))


def make_inputs(
    segments: Segments,
    *,
    heads: int = 4,
    key_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, as a layer hands them over, that want gradients."""
    tokens = segments.spans[-1].stop
    generator = torch.Generator().manual_seed(tokens)

    def tensor(number: int) -> Tensor:
        # Layers split the hidden vector into heads: (1, tokens, heads, dim), seen transposed.
        drawn = torch.randn(1, tokens, number, head_dim, generator=generator, dtype=torch.float64)
        return drawn.to(device, dtype).transpose(1, 2).requires_grad_()

    return tensor(heads), tensor(key_heads), tensor(key_heads)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: ScoreRules
) -> Tensor:
    """Every span as the end of the sequence `prefix + span`, one query at a time."""
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    outputs = []
    for span in segments.spans:
        tokens = [*range(span.prefix_start, span.prefix_stop), *range(span.start, span.stop)]
        keys = key[0, :, tokens].repeat_interleave(groups, dim=0)
        values = value[0, :, tokens].repeat_interleave(groups, dim=0)
        for token in range(span.start, span.stop):
            position = tokens.index(token, span.prefix_stop - span.prefix_start)
            first = 0 if rules.window is None else max(0, position - rules.window + 1)
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,hkd->hk", query[0, :, token], keys[:, seen]) * scale
            if rules.softcap is not None:
                scores = rules.softcap * torch.tanh(scores / rules.softcap)
            weights = scores.softmax(dim=-1)
            outputs.append(torch.einsum("hk,hkd->hd", weights, values[:, seen]))
    return torch.stack(outputs)[None]


def imitated_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """What flash kernels document: sequence by sequence, masks aligned to the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (query.shape[1] != key.shape[1]) == enable_gqa
    assert int(cu_seq_q[-1]) == len(query)
    assert int(cu_seq_k[-1]) == len(key) == len(value)
    assert int(cu_seq_q.diff().max()) == max_q
    assert int(cu_seq_k.diff().max()) == max_k
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    left, right = window_size
    outputs = []
    for begin_q, end_q, begin_k, end_k in zip(
        cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True
    ):
        q, k, v = query[begin_q:end_q], key[begin_k:end_k], value[begin_k:end_k]
        aligned = torch.arange(len(q))[:, None] + len(k) - len(q)
        column = torch.arange(len(k))[None]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if right >= 0:
            seen &= column <= aligned + right
        if left >= 0:
            seen &= column >= aligned - left
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def imitated_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """flash-attn's function of that name, with its names of arguments."""
    assert dropout_p == 0.0
    window = (window_size[0], 0) if causal else window_size
    lengths: Any = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gqa = q.shape[1] != k.shape[1]
    options: Any = {"scale": softmax_scale, "window_size": window, "enable_gqa": gqa}
    return imitated_varlen(q, k, v, *lengths, **options, softcap=softcap)


def gradients(output: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a sum that weighs every element of the output differently."""
    weights = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64)
    loss = (output.double() * weights.view_as(output)).sum()
    return torch.autograd.grad(loss, inputs)
