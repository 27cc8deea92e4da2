"""Length-normalised DPO, with label smoothing."""

import math
from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.DPO_NORM].knobs


@dataclass(frozen=True)
class DPONorm(Loss):
    """DPO on log-ratios a token instead of log-ratios a completion.

    z = β·(s_w/|y_w| − s_l/|y_l|); value = −(1−ε)·logσ(z) − ε·logσ(−z)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`; |y| is the number of its
    scored tokens.

    Args:
        beta: β > 0, per nat a token, so some fifty times that of DPO.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, log-ratios 2 over 4 tokens and −1 over 2, β = 5: z = 5·(0.5 + 0.5) = 5,
        and −logσ(5) = log(1 + e^−5) = 0.006715.

    Source: Tülu 3, arXiv:2411.15124, "length-normalized DPO", where β = 5.

    Deviates: ε, which the paper does not have, is cDPO's as in `DPO`.

    Settings: β 5, learning rate 5e-7 for 8B and 2e-7 for 70B (Tülu 3); OLMo 2: 1e-6 for 7B.

    Curves: the loss falls from ln 2; rewards are per token, so margins stay near 1 for long.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.DPO_NORM

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ)/|y|.

        Args:
            logps: sums of policy and reference, and lengths.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        return PairLoss(
            values=smoothed_logistic(self.beta * (chosen - rejected), self.label_smoothing),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
