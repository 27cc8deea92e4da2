"""Packed attention in one call of a flash kernel for sequences of different lengths.

Queries lie in the row as they are. Keys and values are gathered, so that each span stands behind
its own copy of its prefix; the causal mask of these kernels is aligned to the last query and the
last key, which makes it that of the sequence `prefix + span`.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from preftune.batching.layout import Segments
from preftune.batching.segment_arrays import VarlenArrays, varlen_arrays
from preftune.model.attention_rules import ScoreRules, computed, moved, shared


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: ScoreRules
) -> Tensor:
    """torch's own kernel; see `model.attention` for shapes."""
    arrays = _arrays(segments, query.device)
    queries, keys, values = _gathered(query, key, value, arrays)
    output = varlen_attn(
        queries,
        keys,
        values,
        arrays.cu_seqlens_q,
        arrays.cu_seqlens_k,
        arrays.max_q,
        arrays.max_k,
        scale=rules.scale,
        # The kernel counts positions before the query; (-1, 0) is plain causal attention.
        window_size=(-1 if rules.window is None else rules.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)  # a pair only where more is asked for
    return output.unsqueeze(0)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: ScoreRules
) -> Tensor:
    """The kernel of the package flash-attn, which caps scores, too."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    arrays = _arrays(segments, query.device)
    options: dict[str, Any] = {} if rules.softcap is None else {"softcap": rules.softcap}
    queries, keys, values = _gathered(query, key, value, arrays)
    output = flash_attn_varlen_func(
        queries,
        keys,
        values,
        arrays.cu_seqlens_q,
        arrays.cu_seqlens_k,
        arrays.max_q,
        arrays.max_k,
        softmax_scale=rules.scale,
        causal=True,
        window_size=(-1 if rules.window is None else rules.window - 1, 0),
        **options,
    )
    return output.unsqueeze(0)


def _arrays(segments: Segments, device: torch.device) -> VarlenArrays:
    def build() -> VarlenArrays:
        arrays = varlen_arrays(segments)
        names = ("cu_seqlens_q", "cu_seqlens_k", "kv_index")
        return replace(arrays, **{name: moved(getattr(arrays, name), device) for name in names})

    return shared(segments, "varlen", device, build)


def _gathered(
    query: Tensor, key: Tensor, value: Tensor, arrays: VarlenArrays
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, heads, head_dim) queries, and (keys, key heads, head_dim) keys and values."""
    query, key, value = (
        tensor.squeeze(0).transpose(0, 1) for tensor in computed(query, key, value)
    )
    keys, values = (tensor.index_select(0, arrays.kv_index) for tensor in (key, value))
    return query.contiguous(), keys, values
