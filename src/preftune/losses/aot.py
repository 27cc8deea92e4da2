"""AOT on pairs: margins of policy and reference, each sorted."""

import math
from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss, of_same_rank, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.AOT].knobs


@dataclass(frozen=True)
class AOT(Loss):
    """Alignment via optimal transport, paired form.

    z_i = β·(u_i − v_(i)), u = π_w − π_l, v = ρ_w − ρ_l; value = −(1−ε)·logσ(z) − ε·logσ(−z)

    v_(i) is the reference's margin of the same rank in the batch as u_i among the policy's; π and ρ
    are summed log-probs, nats.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        label_smoothing: ε in [0, 0.5).

    Raises:
        ValueError: if a knob is out of range.

    Example:
        Two pairs, u = (3, 1), v = (0, 2), β = 1: z = (3 − 2, 1 − 0), each −logσ(1) = 0.3133.

    Source: arXiv:2406.05882, the paired objective, logistic loss, hard sorting.

    Deviates: TRL sorts each micro-batch of each rank by itself; here it is the global batch.
    ε is TRL's.

    Settings: β 0.01 in the paper (figure 2), 0.1 here as for dpo (docs/learning.md); learning rate
    as for dpo (ours: the paper names none); large global batches.

    Curves: as dpo's; the batch, not the pair, is brought into order, so accuracy follows
    more slowly.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.AOT

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
        above = logps.chosen - logps.rejected
        # The reference's margins: what is left of the policy's without its log-ratios.
        below = (above - (chosen - rejected)).detach()
        # The n-th smallest of the one against the n-th smallest of the other.
        margins = self.beta * (above - of_same_rank(above, below))
        return PairLoss(
            values=smoothed_logistic(margins, self.label_smoothing),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
