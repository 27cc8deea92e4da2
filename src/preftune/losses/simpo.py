"""SimPO: no reference, a target margin instead."""

from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.SIMPO].knobs


@dataclass(frozen=True)
class SimPO(Loss):
    """Simple preference optimisation.

    z = β·(π_w/|y_w| − π_l/|y_l| − γ/β); value = −(1−ε)·logσ(z) − ε·logσ(−z)

    π is the policy's summed log-prob of a completion, nats, |y| the number of its scored tokens;
    `gamma_beta_ratio` is γ/β.

    Args:
        beta: β > 0, per nat a token. The paper searches 2.0 to 2.5; its authors' README finds
            that 10 can do better.
        gamma_beta_ratio: γ/β ≥ 0, nats a token: the margin aimed at. The paper searches γ from
            0.3 to 1.6; the README advises to start from 0.5 and to search 0 to 1.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, −4 over 4 tokens and −4 over 2, β = 2, γ/β = 0.5: z = 2·(−1 + 2 − 0.5) = 1, and
        −logσ(1) = log(1 + e^−1) = 0.3133.

    Source: arXiv:2405.14734, equation 6.

    Deviates: the margin is given as γ/β, as in the authors' code; ε is in that code, not in the
    paper.

    Settings: β 2 to 2.5 or 10, γ/β 0.5, learning rate 3e-7 to 1e-6 (the authors' README).

    Curves: the first loss depends on the data: no constant. Both log-probs fall; at a rate of 1e-5
    answers fall apart while the curves look fine.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.SIMPO

    beta: float = _DEFAULTS["beta"]
    gamma_beta_ratio: float = _DEFAULTS["gamma_beta_ratio"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × π/|y|, without the target.

        Args:
            logps: sums of the policy, and lengths; the reference is not read.
        """
        chosen = logps.chosen / logps.chosen_lengths
        rejected = logps.rejected / logps.rejected_lengths
        logits = self.beta * (chosen - rejected - self.gamma_beta_ratio)
        return PairLoss(
            values=smoothed_logistic(logits, self.label_smoothing),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """None: there is no reference, so the first value is known only from the data."""
        return None
