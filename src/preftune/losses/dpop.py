"""DPO that does not let the chosen answer fall (DPO-Positive)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from preftune.losses.base import Loss, PairLogps, PairLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.DPOP].knobs


@dataclass(frozen=True)
class DPOP(Loss):
    """DPO-Positive.

    value = −logσ(β·(s_w − s_l − λ·max(0, −s_w)))

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. While the chosen
    completion is less likely than under the reference (s_w < 0), raising it counts 1 + λ times.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        dpop_lambda: λ ≥ 0, without unit.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = −0.1, s_l = −1, β = 0.3, λ = 50: z = 0.3·(0.9 − 5) = −1.23, value 1.4864.

    Source: arXiv:2402.13228, section 4, the DPOP loss.

    Deviates: no. At s_w = 0, where the slope jumps, that of s_w > 0 is taken.

    Settings: β 0.3, λ 50 (the paper); learning rate as for dpo (ours).

    Curves: the loss starts at ln 2, may jump once chosen answers fall below the reference, and
    comes back; the chosen reward stays near or above 0.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.DPOP

    beta: float = _DEFAULTS["beta"]
    dpop_lambda: float = _DEFAULTS["dpop_lambda"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ), without the
        penalty.

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        penalty = self.dpop_lambda * (-chosen).relu()
        return PairLoss(
            values=-logsigmoid(self.beta * (chosen - rejected - penalty)),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and λ."""
        return math.log(2)
