"""DPO, with label smoothing (cDPO)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import LossBase, PairLogps, PairLoss, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.DPO].knobs


@dataclass(frozen=True)
class DPO(LossBase):
    """Direct preference optimisation.

    h = (π_w − ρ_w) − (π_l − ρ_l), with π and ρ the summed log-probs of policy and reference;
    value = −(1−ε)·logσ(βh) − ε·logσ(−βh).

    Args:
        beta: β > 0, per nat: how dear it is to leave the reference.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, h = (−10 + 12) − (−9 + 8) = 3 and β = 0.1: −logσ(0.3) = log(1 + e^−0.3) = 0.5544.

    Source: arXiv:2305.18290, equation 7. ε: E. Mitchell, "A note on DPO with noisy preferences
    and relationship to IPO" (cDPO), 2023.

    Deviates: no.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.DPO

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        return PairLoss(
            values=smoothed_logistic(self.beta * (chosen - rejected), self.label_smoothing),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
