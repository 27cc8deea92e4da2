"""What is compared: ways to run TRL and preftune on the same pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .counts import Layout


@dataclass(frozen=True)
class Arm:
    """One way to train, measured in a process of its own."""

    name: str
    tool: Literal["trl", "preftune"]
    note: str
    layout: Layout
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of TRL's `DPOConfig`, or of preftune's configuration."""
    is_sorted: bool = False
    """Whether the pairs come in batches of similar length; compared with `preftune_sorted`."""
    precision: Literal["same", "bf16"] = "same"
    """`same`: as all arms, fp32 on a CPU and bf16 on a GPU."""
    compact_head: bool = False
    """Patch TRL at run time to score the positions of answers only, as it does on GPUs."""

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward."""
        return bool(self.settings.get("gradient_checkpointing", False))

    @property
    def online_reference(self) -> bool:
        """Whether the reference runs in every step."""
        return self.tool == "trl" and not self.settings["precompute_ref_log_probs"]

    @property
    def baseline(self) -> str:
        """The arm that it is compared with."""
        return "preftune_sorted" if self.is_sorted else "preftune"


_DEFAULT = {"gradient_checkpointing": True, "precompute_ref_log_probs": False}
_TUNED = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}

ON_CPU = (
    Arm("trl_default", "trl", "TRL as released: checkpointing, reference in the step",
        "trl", _DEFAULT),
    Arm("trl_tuned", "trl", "TRL, no checkpointing, reference precomputed", "trl", _TUNED),
    Arm("trl_patched", "trl", "trl_tuned with its head patched to skip prompts, as it does on GPUs",
        "trl_compact", _TUNED, compact_head=True),
    Arm("trl_tuned_sorted", "trl", "trl_tuned, pairs sorted by length", "trl", _TUNED,
        is_sorted=True),
    Arm("preftune", "preftune", "preftune, reference cached", "packed"),
    Arm("preftune_sorted", "preftune", "preftune, pairs sorted by length", "packed",
        is_sorted=True),
    Arm("preftune_budget", "preftune", "preftune, micro-batches of a token budget", "packed",
        {"max_tokens_per_microbatch": 2048}),
    Arm("preftune_bf16", "preftune", "preftune, bf16 products", "packed", precision="bf16"),
    Arm("preftune_concatenated", "preftune", "preftune, both sides padded in one forward",
        "concatenated", {"forward_layout": "concatenated"}),
    Arm("preftune_separate", "preftune", "preftune, one padded forward a side", "separate",
        {"forward_layout": "separate"}),
)  # fmt: skip
"""TRL's head computes logits of prompts and padding on a CPU; on GPUs it skips them."""

GROWTH = ("trl_tuned", "preftune")


def arms_for(device: str, names: Sequence[str] | None, attention: Sequence[str]) -> list[Arm]:
    """The arms of a run.

    Args:
        device: `cpu` or `cuda`.
        names: which; None for all.
        attention: kernels, each of which is one more preftune arm, by name.

    Raises:
        SystemExit: a name is unknown.
    """
    arms = [_on_gpu(arm) for arm in ON_CPU if not _cpu_only(arm)] if device == "cuda" else ON_CPU
    arms = [*arms, *(_with_attention(name) for name in attention)]
    if names is None:
        return arms
    known = {arm.name: arm for arm in arms}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--arms {' '.join(unknown)}: on this device there are {', '.join(known)}")
    return [known[name] for name in names]


def _cpu_only(arm: Arm) -> bool:
    return arm.compact_head or arm.precision == "bf16"


def _on_gpu(arm: Arm) -> Arm:
    if arm.layout != "trl":
        return arm
    return Arm(arm.name, arm.tool, arm.note, "trl_compact", arm.settings, arm.is_sorted)


def _with_attention(name: str) -> Arm:
    settings = {"attn_implementation": name}
    return Arm(f"preftune_{name}", "preftune", f"preftune, attention {name}", "packed", settings)
