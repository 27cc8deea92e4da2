"""What each loss is called, reads and is set by: the table config, help and docs are made from.

No torch here: config and `--help` import this module. Every default and every range of a loss
knob is stated in this file and nowhere else; the dataclasses in the loss files take theirs from it.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias, get_args

WPOAlignment: TypeAlias = Literal["sampled", "none"]


class DPOLossType(StrEnum):
    """The losses on pairs, by the name that `loss_type` takes."""

    DPO = "dpo"
    DPO_NORM = "dpo_norm"
    SIMPO = "simpo"
    WPO = "wpo"


@dataclass(frozen=True)
class Knob:
    """One setting of a loss: its range and its default."""

    name: str
    doc: str
    """One line for help and docs, unit included."""
    default: float | str | None = None
    """What a loss takes unless its `LossSpec` says otherwise; None if every loss has its own."""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    """Whether `low` itself is outside the range."""
    high_open: bool = False
    """Whether `high` itself is outside the range."""
    choices: tuple[str, ...] = ()
    """The words a knob takes that is no number; empty for numbers."""

    @property
    def range(self) -> str:
        """The legal values in words, to follow "must be"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        bounds = []
        if math.isfinite(self.low):
            bounds.append(f"{'above' if self.low_open else 'at least'} {self.low:g}")
        if math.isfinite(self.high):
            bounds.append(f"{'below' if self.high_open else 'at most'} {self.high:g}")
        return " ".join(["a finite number", " and ".join(bounds)]).strip()

    def problem(self, value: object) -> str | None:
        """Say what is wrong with a value.

        Args:
            value: anything; a bool or a number written as text is no number.

        Returns:
            Such as "beta is 0; it must be a finite number above 0"; None if the value is legal.
        """
        if self.choices:
            legal = isinstance(value, str) and value in self.choices
        else:
            legal = self._is_number_in_range(value)
        return None if legal else f"{self.name} is {value!r}; it must be {self.range}"

    def _is_number_in_range(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # Not isfinite, which raises on an int too large for a float.
        finite = abs(value) <= sys.float_info.max
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return finite and above and below


KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        Knob(
            "beta",
            "strength of the pull towards the reference (simpo: scale of the reward); per nat, or "
            "per nat a token for losses that divide by length",
            low=0.0,
            low_open=True,
        ),
        Knob(
            "label_smoothing",
            "assumed share of pairs whose labels are swapped",
            default=0.0,
            low=0.0,
            high=0.5,
            high_open=True,
        ),
        Knob(
            "gamma_beta_ratio",
            "target margin between mean log-probs, in nats a token, before beta scales it",
            default=0.5,
            low=0.0,
        ),
        Knob(
            "wpo_alignment",
            "how a pair's weight is made comparable between tokens: 'sampled' divides each "
            "token's probability by the one expected of a sampled token, 'none' leaves it",
            default="sampled",
            choices=get_args(WPOAlignment),
        ),
    )
}
"""Each knob once, whichever losses read it."""


@dataclass(frozen=True)
class LossSpec:
    """What config, the forward and the docs must know of a loss before torch is loaded."""

    summary: str
    """One line for help and docs."""
    knobs: Mapping[str, Any]
    """The knobs this loss reads, with this loss's own defaults; it has no others."""
    needs_reference: bool
    """Whether it reads the reference's log-probs; where False, no reference forward runs."""
    reads_alignment: bool = False
    """Whether it can read `PairLogps.*_alignment`; the loss object says if, so set, it does."""


def _knobs(*names: str, **own_defaults: float) -> dict[str, Any]:
    return own_defaults | {name: KNOBS[name].default for name in names}


LOSS_SPECS: dict[DPOLossType, LossSpec] = {
    DPOLossType.DPO: LossSpec(
        summary="DPO: logistic loss on the margin of summed log-ratios",
        knobs=_knobs("label_smoothing", beta=0.1),
        needs_reference=True,
    ),
    DPOLossType.DPO_NORM: LossSpec(
        summary="length-normalised DPO (Tülu 3): log-ratios divided by completion length",
        knobs=_knobs("label_smoothing", beta=5.0),
        needs_reference=True,
    ),
    # SimPO's paper searches beta in 2.0..2.5 and gamma in 0.3..1.6; its authors' README advises
    # gamma/beta = 0.5 to start from, within 0..1 (their code's own default is 0.25).
    DPOLossType.SIMPO: LossSpec(
        summary="SimPO: margin of mean log-probs against a target, without a reference",
        knobs=_knobs("gamma_beta_ratio", "label_smoothing", beta=2.0),
        needs_reference=False,
    ),
    DPOLossType.WPO: LossSpec(
        summary="WPO: DPO with each pair weighted by how likely the policy is to write it",
        knobs=_knobs("label_smoothing", "wpo_alignment", beta=0.1),
        needs_reference=True,
        reads_alignment=True,
    ),
}
