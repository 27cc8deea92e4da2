"""SPPO with certain labels."""

from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.SPPO_HARD].knobs


@dataclass(frozen=True)
class SPPOHard(Loss):
    """Self-play preference optimisation, probability 1 for the chosen completion.

    value = (s_w − 1/(2β))² + (s_l + 1/(2β))²

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. Each side has its own
    target, ±1/(2β): 50 nats at β = 0.01, 500 at 0.001, where the pull is all but linear.

    Args:
        beta: β > 0, per nat: 1/η of the paper.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = 2, s_l = −1 and β = 0.1: (2 − 5)² + (−1 + 5)² = 25.

    Source: arXiv:2405.00675, equation 4.7 with win probabilities 1 and 0.

    Deviates: one pass over given pairs; the paper samples and ranks anew each iteration, with win
    probabilities from a preference model.

    Settings: β 0.001 (η = 1e3) in the paper, 0.01 here, for bco_pair's reason; learning rate 5e-7
    (the paper).

    Curves: the loss starts at 1/(2β²), 5,000 at the default, and falls by small fractions; the
    gradient norm is large, so that clipping sets the step. Watch the rewards.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.SPPO_HARD

    beta: float = _DEFAULTS["beta"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        target = 0.5 / self.beta
        return PairLoss(
            values=(chosen - target).square() + (rejected + target).square(),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1/(2β²), whatever the pairs."""
        return 0.5 / self.beta**2
