"""DPO whose beta follows the batch."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import Loss, PairLogps, PairLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.BETA_DPO].knobs
_SMALLEST_BETA = 1e-3


@dataclass(frozen=True)
class BetaDPO(Loss):
    """DPO with dynamic beta, set for each global batch.

    h = s_w − s_l, b = max(0.001, β·(1 + α·(mean h − M))); value = −logσ(b·h)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`; the mean is over the
    global batch, b is constant to the gradient. M is the running mean of h, saved in checkpoints.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        beta_dpo_alpha: α ≥ 0, per nat.
        beta_dpo_momentum: m in [0, 1): M ← m·M + (1−m)·mean h, before it is used; M starts at 0.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, h = 3, first batch: M = 0.3, b = 0.1·(1 + 0.6·2.7) = 0.262, −logσ(0.786) =
        0.3755.

    Source: arXiv:2407.08639, the batch-level beta; order of steps, the least b, and margins in
    nats, not times β, as in the authors' code (github.com/junkangwu/beta-DPO).

    Deviates: without the paper's filter, which draws 80 % of a batch by how near h is to M. The
    authors' code takes M over each micro-batch of all ranks; here it is the global batch.

    Settings: β 0.1, α 0.6, m 0.9, learning rate 5e-7 (the authors' code).

    Curves: the loss starts at ln 2; a batch whose mean margin is below the running one gets a
    smaller b: a weaker pull to the reference, and a gradient smaller in proportion.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.BETA_DPO

    beta: float = _DEFAULTS["beta"]
    beta_dpo_alpha: float = _DEFAULTS["beta_dpo_alpha"]
    beta_dpo_momentum: float = _DEFAULTS["beta_dpo_momentum"]

    def next_running(self, logps: PairLogps) -> Float[Tensor, " kept"]:
        """M of this batch, the one entry, detached.

        Args:
            logps: of the whole global batch, with M of the batch before.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        now = (chosen - rejected).detach().mean()[None]
        before = torch.zeros_like(now) if logps.running is None else logps.running
        return self.beta_dpo_momentum * before + (1 - self.beta_dpo_momentum) * now

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ), β not the batch's.

        Args:
            logps: sums of policy and reference of the whole global batch, and M of the one before.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = self._logratios(logps)
        margins = chosen - rejected
        lead = margins.detach().mean() - self.next_running(logps)[0]
        beta = (self.beta * (1 + self.beta_dpo_alpha * lead)).clamp(min=_SMALLEST_BETA)
        return PairLoss(
            values=-logsigmoid(beta * margins),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs."""
        return math.log(2)
