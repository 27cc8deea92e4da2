"""DPO with an offset for each pair."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from preftune.losses.base import Loss, PairLogps, PairLoss, mean_on_host
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.ODPO].knobs


@dataclass(frozen=True)
class ODPO(Loss):
    """Direct preference optimisation with an offset.

    z = β·(s_w − s_l) − α·Δ; value = −logσ(z)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`; Δ is the pair's margin,
    in units of reward (β × nats), of either sign.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        odpo_alpha: α ≥ 0, without unit.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w − s_l = 3, β = 0.1, Δ = 0.75: z = −0.45, −logσ(−0.45) = 0.9432.

    Source: arXiv:2402.10571, the ODPO loss; α = 1 as in the authors' code.

    Deviates: Δ is taken as the margin column has it. The paper's is an increasing function of the
    difference of two scores, in most of its runs the logarithm: write that into the column.

    Settings: α 1, learning rate 5e-7 (the authors' code, with β 0.05 to 0.7 in its examples); β 0.1
    is ours.

    Curves: the loss starts at the mean of log(1 + e^αΔ) and falls; reward margins settle beyond αΔ.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.ODPO

    beta: float = _DEFAULTS["beta"]
    odpo_alpha: float = _DEFAULTS["odpo_alpha"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ), without the offset.

        Args:
            logps: sums of policy and reference, and margins.

        Raises:
            ValueError: if the reference's log-probs or the margins are missing.
        """
        chosen, rejected = self._logratios(logps)
        return PairLoss(
            values=-logsigmoid(self.beta * (chosen - rejected) - self._offsets(logps)),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def _offsets(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        if logps.margin is None:
            raise ValueError(f"{self.loss_type} reads margin, and it is None; give one a pair")
        return self.odpo_alpha * logps.margin

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: that of log(1 + e^αΔ).

        Args:
            logps: the pairs whose margins count. Waits for the device: for the start of a run.
        """
        return mean_on_host(softplus(self._offsets(logps).double()))
