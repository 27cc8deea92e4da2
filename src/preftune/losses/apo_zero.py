"""APO where the chosen answers are better than the model's."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import PairLogps, RewardLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.APO_ZERO].knobs


@dataclass(frozen=True)
class APOZero(RewardLoss):
    """Anchored preference optimisation, zero.

    value = 1 − σ(βs_w) + σ(βs_l)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. Chosen up, rejected down,
    each against the reference; between 0 and 2.

    Args:
        beta: β > 0, per nat.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = 2, s_l = −1 and β = 0.1: σ(−0.2) + σ(−0.1) = 0.4502 + 0.4750 = 0.9252.

    Source: arXiv:2408.06266, equation 7.

    Deviates: no.

    Settings: β 0.1, learning rate 2e-7 (the paper, section 5.2).

    Curves: the loss falls from 1; both gradients fade as rewards leave 0, in either direction.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.APO_ZERO

    beta: float = _DEFAULTS["beta"]

    def _of_rewards(
        self, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        # 1 − σ(x) as σ(−x): nothing is lost to rounding where it is small.
        return (-chosen).sigmoid() + rejected.sigmoid()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1, whatever the pairs."""
        return 1.0
