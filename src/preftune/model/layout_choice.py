"""Which forward layout and attention kernel a model takes, found out on the model itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from preftune.batching.layout import LayoutName
from preftune.config.dpo import ForwardLayout
from preftune.config.model import AttentionName
from preftune.errors import ModelError
from preftune.model.attention import FUSED, REGISTERED, Demands, LayerCall, PackedKernel, why_not
from preftune.model.forward import PolicyModel
from preftune.model.layout_probe import TRIAL_REPEATS, Probe, Trial, rounded_to, run_trial
from preftune.model.load import dropout_settings


@dataclass(frozen=True)
class LayoutChoice:
    """How rows go through a model."""

    name: LayoutName
    why: str = ""
    """Why it is not `shared_prefix`, where that was wanted."""
    attention: str = ""
    """What computes attention: a kernel of packed rows, or transformers' name for padded ones."""
    tried: Mapping[str, float | str] = field(default_factory=dict)
    """Kernels that were tried: seconds of a forward and backward, or why it is not right here."""


def choose_layout(
    policy: PolicyModel,
    wanted: ForwardLayout,
    attention: AttentionName,
    longest: int,
    *,
    autocast: torch.dtype | None = None,
    with_backward: bool = True,
) -> LayoutChoice:
    """Take the packed layout where the model is proved to follow it, and the fastest right kernel.

    The model's attention function is exchanged for the one chosen, for good.

    Args:
        policy: in eval mode, on its device.
        wanted: `auto` falls back to `concatenated`.
        attention: `attn_implementation`. `auto` measures on GPUs and is `sdpa` on CPUs.
        longest: tokens of the longest row: the probe reaches past a sliding window, and a limit of
            length, only if rows do.
        autocast: type of training's products, where it is not the weights'.
        with_backward: False for a model that only scores.

    Raises:
        ModelError: what is wanted by name cannot be had.
    """
    if wanted in ("concatenated", "separate"):
        return _padded(policy.model, wanted, attention)
    if attention == "eager":
        why = "attn_implementation eager has no packed form"
    else:
        before = policy.model.config._attn_implementation
        assert before is not None  # transformers has chosen one by now
        repeats = TRIAL_REPEATS if attention == "auto" else 0
        try:
            packed = _packed(_Setting(policy, longest, autocast, with_backward, repeats), attention)
        except _Refused as error:
            policy.model.set_attn_implementation(before)
            why = str(error)
        else:
            use_layout(policy, packed)
            return packed
    if attention in ("varlen", "flex"):  # kernels of packed rows alone
        raise ModelError(
            f"attn_implementation is {attention!r} (as set, or as the run began), and {why}; begin "
            "a run with auto"
        )
    if wanted == "shared_prefix":
        raise ModelError(
            f"forward_layout is 'shared_prefix', and {why}; leave it out, and the pairs are padded"
        )
    return _padded(policy.model, "concatenated", attention, why)


def use_layout(policy: PolicyModel, choice: LayoutChoice) -> None:
    """Give a model the attention function of a choice that was made on another rank."""
    if choice.name == "shared_prefix":
        name = REGISTERED[cast(PackedKernel, choice.attention)]
    else:
        name = choice.attention
    if policy.model.config._attn_implementation != name:
        policy.model.set_attn_implementation(name)


def _padded(
    model: PreTrainedModel, name: LayoutName, attention: AttentionName, why: str = ""
) -> LayoutChoice:
    if attention == "flash_attention_2":
        try:
            model.set_attn_implementation(attention)
        except (ImportError, ValueError) as error:
            raise ModelError(
                f"attn_implementation is {attention!r}, which {type(model).__name__} cannot take "
                f"({_first_line(error)}); set it to auto"
            ) from error
    return LayoutChoice(name, why, str(model.config._attn_implementation))


class _Refused(Exception):
    """Why pairs cannot be packed."""


class _Setting(NamedTuple):
    policy: PolicyModel
    longest: int
    autocast: torch.dtype | None
    with_backward: bool
    repeats: int

    def probed(self, probe: Probe, kernel: PackedKernel) -> tuple[str | None, list[LayerCall]]:
        """Why `kernel` is not right on the probe's pairs, and what layers asked of it."""
        try:
            self.policy.model.set_attn_implementation(REGISTERED[kernel])
            return probe.packed(self.policy)
        except Exception as error:  # whatever a model does with a name or keyword it does not know
            return f"its attention cannot be exchanged ({_told(error)})", []

    def trial(self, kernel: PackedKernel) -> Trial:
        """Forwards and backwards with `kernel`, as in training."""
        self.policy.model.set_attn_implementation(REGISTERED[kernel])
        return run_trial(
            self.policy,
            self.longest,
            self.autocast,
            with_backward=self.with_backward,
            repeats=self.repeats,
        )


def _packed(setting: _Setting, attention: AttentionName) -> LayoutChoice:
    """The packed layout with the kernel asked for, or the fastest one that is right.

    Raises:
        _Refused: the model does not follow the layout, or not with the kernel asked for.
    """
    policy, autocast = setting.policy, setting.autocast
    model, device = policy.model, policy.model.device
    candidates = _candidates(attention, device)
    probe = Probe.of(policy, setting.longest, None)
    # Flash kernels cannot compute in fp32, the type of weights that train in bf16.
    half = Probe.of(policy, setting.longest, autocast) if candidates and autocast else probe
    # Span by span first: it can express every model, so where it fails, packing itself does.
    why, calls = setting.probed(probe, "sdpa")
    if why is not None:
        raise _Refused(f"{type(model).__name__} does not follow the packed layout: {why}")
    dropout = bool(dropout_settings(model.config))
    demands = Demands(device, autocast or model.dtype, dropout, calls)
    refused: dict[PackedKernel, str] = {}
    for kernel in candidates:
        reason = why_not(kernel, demands)
        if reason is None:
            reason, _ = setting.probed(probe if kernel == "flex" else half, kernel)
        if reason is not None:
            refused[kernel] = reason
    seconds = _timed(setting, [kernel for kernel in candidates if kernel not in refused], refused)
    if attention in refused:
        raise _Refused(f"{attention} is not right here: {refused[attention]}")
    if attention == "auto":
        chosen = min(seconds, key=seconds.__getitem__, default="sdpa")
        return LayoutChoice("shared_prefix", "", chosen, {**seconds, **refused})
    return LayoutChoice("shared_prefix", "", attention)


def _candidates(attention: AttentionName, device: torch.device) -> list[PackedKernel]:
    """Kernels to hold against the one that goes span by span."""
    if attention == "auto":
        return list(FUSED) if device.type == "cuda" else []
    return [kernel for kernel in FUSED if kernel == attention]


def _timed(
    setting: _Setting, kernels: list[PackedKernel], refused: dict[PackedKernel, str]
) -> dict[PackedKernel, float]:
    """Seconds of a forward and backward with each kernel that is right; `refused` takes the others.

    Empty if there is nothing to compare.
    """
    if not kernels:
        return {}
    try:
        plain = setting.trial("sdpa")
    except Exception as error:  # of the memory that an ordinary row takes
        why = f"there is nothing to hold it against: sdpa fails ({_told(error)})"
        refused.update(dict.fromkeys(kernels, why))
        return {}
    seconds: dict[PackedKernel, float] = {"sdpa": plain.seconds}
    dtype = rounded_to(setting.policy, setting.autocast)
    for kernel in kernels:
        try:
            trial = setting.trial(kernel)
            why = trial.differs(plain, dtype)
        except Exception as error:  # of a kernel, its compiler or the memory it takes
            why = f"it fails ({_told(error)})"
        else:
            seconds[kernel] = trial.seconds
        if why is not None:
            refused[kernel] = why
    return {kernel: value for kernel, value in seconds.items() if kernel not in refused}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]
