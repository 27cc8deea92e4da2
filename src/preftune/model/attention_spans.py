"""Packed attention span by span: right for every model and device, and what others are held to."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from preftune.batching.layout import Segments, Span
from preftune.model.attention_rules import ScoreRules, shared


def span_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: ScoreRules
) -> Tensor:
    """One causal attention a span; see `model.attention` for shapes."""
    lengths = [span.stop - span.start for span in segments.spans]
    # The backward of a split is one concatenation; that of a slice is a tensor as long as the row.
    pieces = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    number_of = {span.start: number for number, span in enumerate(segments.spans)}
    outputs = []
    for span, queries, keys, values in zip(segments.spans, *pieces, strict=True):
        prefix = span.prefix_stop - span.prefix_start
        if prefix:
            home = number_of[span.prefix_start]
            keys, values = (
                torch.cat((of[home][:, :, :prefix], own), dim=2)
                for of, own in zip(pieces[1:], (keys, values), strict=True)
            )
        mask = _mask(segments, span, rules.window, query.device)
        if rules.softcap is None and rules.sinks is None:
            outputs.append(
                scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=mask,
                    dropout_p=rules.dropout,
                    is_causal=mask is None,
                    scale=rules.scale,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        else:
            if mask is None:
                mask = _causal(span.stop - span.start, 0, None, query.device)
            outputs.append(_explicit(queries, keys, values, mask, rules))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _mask(
    segments: Segments, span: Span, window: int | None, device: torch.device
) -> Tensor | None:
    """What the queries of a span see, or None where that is plain causal attention."""
    prefix, own = span.prefix_stop - span.prefix_start, span.stop - span.start
    if window is not None and prefix + own <= window:
        window = None
    if prefix == 0 and window is None:
        return None
    key = ("mask", prefix, own, window)
    return shared(segments, key, device, lambda: _causal(own, prefix, window, device))


def _causal(own: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """(own, prefix + own) True where a query sees a key; distances are those of positions."""
    mask = torch.ones(own, prefix + own, dtype=torch.bool, device=device).tril(prefix)
    return mask if window is None else mask.triu(prefix - window + 1)


def _explicit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: ScoreRules) -> Tensor:
    """Attention with its scores written out, for what the fused kernels do not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if rules.scale is None else rules.scale
    scores = query @ key.transpose(2, 3) * scale
    if rules.softcap is not None:
        scores = torch.tanh(scores / rules.softcap) * rules.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if rules.sinks is not None:
        column = rules.sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights[..., : key.shape[2]], rules.dropout, training=True)
    return weights @ value
