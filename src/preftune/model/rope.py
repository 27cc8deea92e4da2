"""Rotary positions whose frequencies depend on the longest sequence of a call of the model."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from preftune.batching.layout import LengthLimits


def length_limits(config: PreTrainedConfig) -> LengthLimits:
    """Which lengths must not share a call of the model that `config` describes."""
    kinds = _rope_parameters(config)
    switches = {
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if kind["rope_type"] == "longrope"
    }
    is_dynamic = any("dynamic" in kind["rope_type"] for kind in kinds)
    # Dynamic NTK counts from the positions of the model, whatever else its config says.
    start = int(config.get_text_config().max_position_embeddings) if is_dynamic else None
    return LengthLimits(tuple(sorted(switches)), start)


def longest_sequence(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model takes; None where its config names no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # Dynamic NTK names the positions that it stretches from.
    factors = [
        kind.get("factor") or 1.0
        for kind in _rope_parameters(config)
        if "dynamic" in kind["rope_type"]
    ]
    return positions if positions is None else int(positions * max(factors, default=1.0))


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """One set for all layers, or one for each type of layer; none without RoPE."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [k for k in rope.values() if isinstance(k, dict)]


def forget_earlier_calls(model: nn.Module) -> None:
    """Make dynamic NTK's frequencies a function of the call alone.

    Its modules keep those of the longest sequence yet for all that are longer than the model's
    positions, so that log-probs depend on what ran before (and at exactly that length, too).
    """
    for module in model.modules():
        if any("dynamic" in kind for kind in _kinds(module).values()):
            module.register_forward_pre_hook(_reset)


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """RoPE kinds of a rotary module by type of layer, None for all; empty for other modules."""
    kinds = getattr(module, "rope_type", None) or {}
    return {None: kinds} if isinstance(kinds, str) else kinds


def _reset(module: Any, _: Any) -> None:
    """Put a rotary module into the state that it was built in."""
    for layer_type in _kinds(module):
        prefix = "" if layer_type is None else f"{layer_type}_"
        original = getattr(module, f"{prefix}original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
