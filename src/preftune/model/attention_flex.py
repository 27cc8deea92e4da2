"""Packed attention by FlexAttention: one fused kernel that skips blocks of scores nobody reads."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from preftune.batching.layout import Segments
from preftune.batching.segment_arrays import TokenArrays, block_arrays, token_arrays
from preftune.model.attention_rules import ScoreRules, computed, moved, shared

BLOCK_SIZE = 128
"""Tokens of a block, queries and keys alike: the kernel's own default."""
RECOMPILE_LIMIT = 64


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, rules: ScoreRules
) -> Tensor:
    """One call for the whole row; see `model.attention` for shapes."""
    query, key, value = computed(query, key, value)
    output = _kernel(query.device.type)(
        query,
        key,
        value,
        score_mod=None if rules.softcap is None else _capping(rules.softcap),
        block_mask=block_mask(segments, rules.window, query.device),
        scale=rules.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """Which blocks are computed, and the mask inside those that are not seen whole."""

    def build() -> BlockMask:
        tokens = shared(segments, "tokens", device, lambda: _tokens_on(segments, device))
        blocks = block_arrays(segments, BLOCK_SIZE, window)
        length = segments.spans[-1].stop
        partial, full = _lists(blocks.partial, device), _lists(blocks.full, device)
        by_key, full_by_key = _lists(blocks.partial.T, device), _lists(blocks.full.T, device)
        return BlockMask(
            seq_lengths=(length, length),
            kv_num_blocks=partial[0],
            kv_indices=partial[1],
            full_kv_num_blocks=full[0],
            full_kv_indices=full[1],
            q_num_blocks=by_key[0],
            q_indices=by_key[1],
            full_q_num_blocks=full_by_key[0],
            full_q_indices=full_by_key[1],
            BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
            mask_mod=_seeing(tokens, window),
        )

    return shared(segments, ("blocks", window), device, build)


def _tokens_on(segments: Segments, device: torch.device) -> TokenArrays:
    arrays = token_arrays(segments)
    return TokenArrays(
        *(
            moved(tensor, device)
            for tensor in (arrays.span, arrays.position, arrays.prefix_start, arrays.prefix_stop)
        )
    )


def _lists(seen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are seen, and all block numbers, seen ones first."""
    count = seen.sum(dim=-1, dtype=torch.int32)
    order = torch.argsort(seen.to(torch.uint8), dim=-1, descending=True, stable=True)
    # For all of a batch (of one row) and for all heads.
    return moved(count[None, None], device), moved(order.to(torch.int32)[None, None], device)


def _seeing(tokens: TokenArrays, window: int | None) -> Callable[..., Tensor]:
    """Whether a token sees another, as the kernel asks it: of indices into the row."""
    # The kernel is compiled with the tensors that the function closes over as its arguments.
    span, position = tokens.span, tokens.position
    prefix_start, prefix_stop = tokens.prefix_start, tokens.prefix_stop

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (span[query] == span[key]) & (key <= query)
        before = (key >= prefix_start[query]) & (key < prefix_stop[query])
        return own | before

    if window is None:
        return sees
    reach: int = window

    def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = torch.where(
            span[query] == span[key],
            query - key < reach,
            position[query] - (key - prefix_start[query]) < reach,
        )
        return sees(batch, head, query, key) & near

    return sees_near


@cache
def _capping(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return capped


@cache
def _kernel(device_type: str) -> Callable[..., Any]:
    if device_type != "cuda":
        # Uncompiled it computes all scores, which is for tests: a CPU has no backward of it anyway.
        return flex_attention
    # A graph each with and without gradients, window and cap, of one length, of any, and of one
    # block: past the limit (8) torch computes all scores, or with fullgraph stops.
    torch._dynamo.config.recompile_limit = max(
        RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit
    )
    return torch.compile(flex_attention, fullgraph=True)
