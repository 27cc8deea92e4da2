"""IPO: a finite target for the margin."""

from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss
from preftune.losses.knobs import SumOrMean
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.IPO].knobs


@dataclass(frozen=True)
class IPO(Loss):
    """Identity preference optimisation.

    value = (s_w − s_l − 1/(2β))²

    s = π − ρ is the log-ratio of a completion, in nats: summed over its tokens, or their mean with
    `ipo_log_ratios` "mean". The target of the margin is 1/(2β): 5 nats at β = 0.1.

    Args:
        beta: β > 0, per nat, or per nat a token for means: the paper's τ.
        ipo_log_ratios: "sum" or "mean".

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w − s_l = 3 and β = 0.1: (3 − 5)² = 4.

    Source: arXiv:2310.12036, equation 17.

    Deviates: no with "sum". "mean" is TRL's form, which its authors report to be what the paper's
    were trained with; its target of 1/(2β) nats a token is far at the β of "sum".

    Settings: β 0.1 (the paper tries 0.1 to 1 on toy problems); learning rate as for dpo (ours: the
    paper's 1e-2 is for them).

    Curves: the loss falls from 1/(4β²) (25 at β = 0.1); margins settle at 1/(2β), rewards at ½.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.IPO

    beta: float = _DEFAULTS["beta"]
    ipo_log_ratios: SumOrMean = _DEFAULTS["ipo_log_ratios"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × s.

        Args:
            logps: sums of policy and reference, and lengths ("mean").

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        if self.ipo_log_ratios == "mean":
            chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
        return PairLoss(
            values=(chosen - rejected - 0.5 / self.beta).square(),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1/(4β²), whatever the pairs."""
        return 0.25 / self.beta**2
