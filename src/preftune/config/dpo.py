"""Which loss, with which knobs."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem
from preftune.config.section import Section
from preftune.losses.spec import KNOBS, LOSS_SPECS, DPOLossType, WPOAlignment

Layout = Literal["shared_prefix", "concatenated", "separate"]
ForwardLayout = Literal["auto", "shared_prefix", "concatenated", "separate"]
PACKED_ONLY = ("varlen", "flex")
"""Values of `attn_implementation` that padded pairs cannot have."""


def layout_problems(wanted_layout: ForwardLayout, attn_implementation: str) -> list[Problem]:
    """The problem of a layout with an attention kernel that has no form for it."""
    if wanted_layout == "shared_prefix" and attn_implementation == "eager":
        message = (
            "attn_implementation eager has no packed form: take auto or sdpa, or another "
            "forward_layout"
        )
        return [Problem("forward_layout", wanted_layout, message, ("attn_implementation",))]
    if wanted_layout in ("concatenated", "separate") and attn_implementation in PACKED_ONLY:
        message = f"it is a kernel of packed rows, and the layout is {wanted_layout}: take auto"
        others = ("forward_layout", "concatenated_forward")
        return [Problem("attn_implementation", attn_implementation, message, others)]
    return []


@dataclass(kw_only=True)
class DPOConfig(Section):
    """The loss. A knob left unset takes the default of the chosen loss."""

    loss_type: DPOLossType = DPOLossType.DPO
    """The loss. dpo: sigmoid of the log-ratios; dpo_norm: of log-ratios per token; simpo: of
    log-probs per token, no reference; wpo: dpo weighted by the policy's own probabilities."""

    beta: float | None = None
    """Strength of the pull to the reference (simpo: scale of the reward), above 0. Unset: the
    loss's own (dpo 0.1, dpo_norm 5, simpo 2, wpo 0.1)."""

    label_smoothing: float | None = None
    """Probability that a preference label is wrong, 0 (off) to below 0.5. Unset: the loss's
    default."""

    gamma_beta_ratio: float | None = None
    """simpo's target margin between mean log-probs, in nats a token, before beta scales it; 0
    (off) or more. Unset: the loss's default."""

    wpo_alignment: WPOAlignment | None = None
    """How wpo makes a pair's weight comparable between tokens. sampled: each token's probability
    divided by the one expected of a sampled token; none: as it is. Unset: the loss's default."""

    forward_layout: ForwardLayout = "auto"
    """How pairs go through the model. shared_prefix: one packed row without padding, each prompt
    once; concatenated: chosen and rejected as padded rows of one forward; separate: one side after
    the other, less memory. auto: shared_prefix where the model follows it, else concatenated."""

    concatenated_forward: bool | None = None
    """Another name for `forward_layout`: true is concatenated, false is separate. Unset: what
    `forward_layout` says."""

    def __post_init__(self) -> None:
        """Fill the knobs of the chosen loss."""
        spec = LOSS_SPECS.get(self.loss_type)  # None only while a wrong name awaits its report
        for name, default in spec.knobs.items() if spec else ():
            if getattr(self, name) is None:
                setattr(self, name, default)

    @property
    def wanted_layout(self) -> ForwardLayout:
        """What `forward_layout` and `concatenated_forward` ask for together."""
        if self.forward_layout != "auto" or self.concatenated_forward is None:
            return self.forward_layout
        return "concatenated" if self.concatenated_forward else "separate"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return LOSS_SPECS[self.loss_type].needs_reference

    @property
    def loss_knobs(self) -> dict[str, float | str]:
        """The chosen loss's knobs and their values."""
        return {name: getattr(self, name) for name in LOSS_SPECS[self.loss_type].knobs}

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        applying = LOSS_SPECS[self.loss_type].knobs
        for name, knob in KNOBS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if name not in applying:
                readers = ", ".join(loss for loss, spec in LOSS_SPECS.items() if name in spec.knobs)
                message = f"the loss {self.loss_type.value} does not read it, only {readers}"
                found.append(Problem(name, value, message, ("loss_type",)))
            elif knob.problem(value):
                found.append(Problem(name, value, f"it must be {knob.range}"))
        if self.concatenated_forward is not None and self.forward_layout != "auto":
            said = "concatenated" if self.concatenated_forward else "separate"
            if said != self.forward_layout:
                message = f"it means the layout {said}, but forward_layout is {self.forward_layout}"
                key, value = "concatenated_forward", self.concatenated_forward
                found.append(Problem(key, value, f"{message}; give one", ("forward_layout",)))
        return found
