"""APO where the chosen answers are worse than the model's."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import PairLogps, RewardLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.APO_DOWN].knobs


@dataclass(frozen=True)
class APODown(RewardLoss):
    """Anchored preference optimisation, down.

    value = σ(βs_w) + 1 − σ(β(s_w − s_l))

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. Both completions go down,
    the rejected one further; between 0 and 2.

    Args:
        beta: β > 0, per nat.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = 2, s_l = −1 and β = 0.1: σ(0.2) + σ(−0.3) = 0.5498 + 0.4256 = 0.9754.

    Source: arXiv:2408.06266, equation 8.

    Deviates: no.

    Settings: β 0.1, learning rate 2e-7 in the paper (section 5.2); β 1 here, which stops sooner: at
    0.1 a hundred steps displace answers by 54 nats and rank fewer pairs right (docs/learning.md).

    Curves: the loss falls from 1; both rewards fall below 0 by intent, the rejected one first. At
    the reference the two terms of the chosen completion cancel.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.APO_DOWN

    beta: float = _DEFAULTS["beta"]

    def _of_rewards(
        self, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        # 1 − σ(x) as σ(−x): nothing is lost to rounding where it is small.
        return chosen.sigmoid() + (rejected - chosen).sigmoid()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1, whatever the pairs."""
        return 1.0
