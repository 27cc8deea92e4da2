"""Packed attention of a row whose tokens several processes share."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from preftune.batching.layout import Segments
from preftune.config.problem import listed
from preftune.distributed.sequence import SequenceGroup
from preftune.errors import ModelError
from preftune.model.attention_rules import ScoreRules, computed


def shared_attention(
    kernel: Callable[[Tensor, Tensor, Tensor, Segments, ScoreRules], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    rules: ScoreRules,
    group: SequenceGroup,
) -> Tensor:
    """What `kernel` gives for the whole row, here for this process' tokens.

    Args:
        kernel: sees all tokens of some heads.
        query: (1, heads, own tokens, head_dim); keys and values alike, see `model.attention`.
        key: of the own tokens.
        value: of the own tokens.
        segments: of the whole row.
        rules: of the layer, for all heads.
        group: who shares the row.

    Returns:
        (1, own tokens, heads, value_dim).
    """
    check_heads(query.shape[1], group.size)
    num_tokens, num_own = segments.spans[-1].stop, query.shape[2]
    if rules.sinks is not None:
        rules = replace(rules, sinks=group.own_heads(rules.sinks))
    query, key, value = group.to_heads(computed(query, key, value), num_tokens)
    return group.to_tokens(kernel(query, key, value, segments, rules), num_own)


def check_heads(num_heads: int, size: int) -> None:
    """Refuse heads of queries that cannot be dealt out evenly.

    Args:
        num_heads: of a layer.
        size: `sequence_parallel_size`.

    Raises:
        ModelError: they cannot.
    """
    if num_heads % size:
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ModelError(
            f"sequence_parallel_size is {size}, and the model has {num_heads} attention heads "
            "(num_attention_heads), which the processes of a group share out evenly; set it to "
            f"{listed(fitting)}"
        )
