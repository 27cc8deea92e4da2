"""AOT over chosen and rejected answers, each sorted."""

import math
from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss, of_same_rank, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.AOT_UNPAIRED].knobs


@dataclass(frozen=True)
class AOTUnpaired(Loss):
    """Alignment via optimal transport, unpaired form.

    z_i = β·(s_w,i − s_l,(i)); value = −(1−ε)·logσ(z) − ε·logσ(−z)

    s_l,(i) is the rejected log-ratio of the same rank in the batch as s_w,i among the chosen; s is
    π − ρ, sums in nats. Which answers make a pair does not matter.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        label_smoothing: ε in [0, 0.5).

    Raises:
        ValueError: if a knob is out of range.

    Example:
        Two pairs, s_w = (3, 1), s_l = (0, 2), β = 1: z = (3 − 2, 1 − 0), each −logσ(1) = 0.3133.

    Source: arXiv:2406.05882, the unpaired objective, logistic loss, hard sorting.

    Deviates: TRL sorts each micro-batch of each rank by itself; here it is the global batch.
    ε is TRL's.

    Settings: β 0.01 in the paper (figure 2), 0.3 here (docs/learning.md); learning rate as for dpo
    (ours: the paper names none); large global batches.

    Curves: as dpo's; the batch, not the pair, is brought into order, so accuracy follows
    more slowly.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.AOT_UNPAIRED

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value of each rank in the batch, put where its larger side stands, and implicit rewards.

        Args:
            logps: sums of policy and reference of the whole global batch.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        # The n-th smallest of the one against the n-th smallest of the other.
        margins = self.beta * (chosen - of_same_rank(chosen, rejected))
        return PairLoss(
            values=smoothed_logistic(margins, self.label_smoothing),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
