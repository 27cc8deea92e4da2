"""APO where the chosen answers are better than the model's."""

from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.APO_ZERO].knobs


@dataclass(frozen=True)
class APOZero(Loss):
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

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        chosen_rewards, rejected_rewards = self.beta * chosen, self.beta * rejected
        return PairLoss(
            # 1 − σ(x) as σ(−x): nothing is lost to rounding where it is small.
            values=(-chosen_rewards).sigmoid() + rejected_rewards.sigmoid(),
            chosen_rewards=chosen_rewards.detach(),
            rejected_rewards=rejected_rewards.detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1, whatever the pairs."""
        return 1.0
