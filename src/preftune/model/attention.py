"""Attention of a packed row, span by span, called by unedited models of transformers.

Registered under a name of its own, so that transformers builds no mask and hands the layout on to
every layer. Linear layers see exactly the real tokens of a micro-batch; here each answer sees its
prompt and itself and nothing else.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from preftune.batching.layout import Segments, Span

SEGMENTS = "preftune_segments"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim), rotated.
        key: (1, key heads, tokens, head_dim), rotated.
        value: (1, key heads, tokens, value_dim).
        attention_mask: None: the segments say who sees whom.
        scaling: of the scores; None is head_dim ** -0.5.
        dropout: probability, 0 in eval mode.
        sliding_window: a token sees this many positions, itself among them.
        softcap: Gemma 2: scores become softcap * tanh(scores / softcap).
        s_aux: (heads,) gpt-oss's attention sinks: a logit more in each softmax, without a value.
        segments: the spans; reaches this function as a keyword of the model's forward.

    Returns:
        (1, tokens, heads, value_dim), and no weights.
    """
    if segments is None or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError("packed attention was called without a packed row")
    segments.calls.append(getattr(module, "layer_idx", -1))
    outputs = []
    for span in segments.spans:
        keys, values = _with_prefix(key, span), _with_prefix(value, span)
        queries = query[:, :, span.start : span.stop]
        mask = _mask(segments, span, sliding_window, query.device)
        if softcap is None and s_aux is None:
            outputs.append(
                scaled_dot_product_attention(
                    queries,
                    keys,
                    values,
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=mask is None,
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
        else:
            if mask is None:
                mask = _causal(span.stop - span.start, 0, None, query.device)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            outputs.append(_explicit(queries, keys, values, mask, scale, dropout, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _with_prefix(tensor: Tensor, span: Span) -> Tensor:
    own = tensor[:, :, span.start : span.stop]
    if span.prefix_start == span.prefix_stop:
        return own
    return torch.cat((tensor[:, :, span.prefix_start : span.prefix_stop], own), dim=2)


def _mask(
    segments: Segments, span: Span, window: int | None, device: torch.device
) -> Tensor | None:
    """What the queries of a span see, or None where that is plain causal attention."""
    prefix, own = span.prefix_stop - span.prefix_start, span.stop - span.start
    if window is not None and prefix + own <= window:
        window = None
    if prefix == 0 and window is None:
        return None
    key = (prefix, own, window, device)
    if key not in segments.masks:
        segments.masks[key] = _causal(own, prefix, window, device)
    return segments.masks[key]


def _causal(own: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """(own, prefix + own) True where a query sees a key; distances are those of positions."""
    mask = torch.ones(own, prefix + own, dtype=torch.bool, device=device).tril(prefix)
    return mask if window is None else mask.triu(prefix - window + 1)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with its scores written out, for what the fused kernels do not know."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = scores.softmax(dim=-1, dtype=dtype).to(query.dtype)
    weights = nn.functional.dropout(weights[..., : key.shape[2]], dropout, training=True)
    return weights @ value


AttentionInterface.register(SEGMENTS, segment_attention)
