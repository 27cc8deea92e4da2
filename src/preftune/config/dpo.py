"""Which loss, with which knobs."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem
from preftune.config.section import Section
from preftune.losses.knobs import KNOBS, LossKnobs
from preftune.losses.spec import LOSS_SPECS, DPOLossType

Layout = Literal["shared_prefix", "concatenated", "separate"]
ForwardLayout = Literal["auto", "shared_prefix", "concatenated", "separate"]


def layout_problems(forward_layout: ForwardLayout, attn_implementation: str) -> list[Problem]:
    """The problem of a packed layout with an attention kernel that has no packed form."""
    if forward_layout != "shared_prefix" or attn_implementation in ("auto", "sdpa"):
        return []
    message = (
        f"attn_implementation {attn_implementation} has no packed form: take auto or sdpa, or "
        "another forward_layout"
    )
    return [Problem("forward_layout", forward_layout, message, ("attn_implementation",))]


def knob_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of the loss's knobs: not read by the loss, or out of its range."""
    found = []
    spec = LOSS_SPECS[config.loss_type]
    applying = spec.applying(vars(config))
    for name in KNOBS:
        value = getattr(config, name)
        if value is None:
            continue
        if name not in applying:
            message = f"the loss {config.loss_type.value} {spec.refusal(name)}"
            found.append(Problem(name, value, message, ("loss_type",)))
        elif spec.knob(name).problem(value):
            found.append(Problem(name, value, f"it must be {spec.knob(name).range}"))
    return found


@dataclass(kw_only=True)
class LossChoice:
    """The loss, ahead of its knobs."""

    loss_type: DPOLossType = DPOLossType.DPO
    """The loss. docs/losses.md gives each one's formula, source, settings and curves."""


@dataclass(kw_only=True)
class DPOConfig(LossKnobs, LossChoice, Section):
    """The loss. A knob left unset takes the default of the chosen loss."""

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
        for name, default in spec.applying(vars(self)).items() if spec else ():
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
        applying = LOSS_SPECS[self.loss_type].applying(vars(self))
        return {name: getattr(self, name) for name in applying}

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = knob_problems(self)
        if self.concatenated_forward is not None and self.forward_layout != "auto":
            said = "concatenated" if self.concatenated_forward else "separate"
            if said != self.forward_layout:
                message = f"it means the layout {said}, but forward_layout is {self.forward_layout}"
                key, value = "concatenated_forward", self.concatenated_forward
                found.append(Problem(key, value, f"{message}; give one", ("forward_layout",)))
        return found
