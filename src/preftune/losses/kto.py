"""KTO: prospect theory on single completions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import mean_on_host
from preftune.losses.spec import LOSS_SPECS, DPOLossType
from preftune.losses.unpaired import CompletionLogps, CompletionLoss, UnpairedLoss

_DEFAULTS = LOSS_SPECS[DPOLossType.KTO].knobs


@dataclass(frozen=True)
class KTO(UnpairedLoss):
    """Kahneman-Tversky optimisation.

    value = λ_D·(1 − σ(β·(s − z))) if desirable; value = λ_U·(1 − σ(β·(z − s))) if not

    s = π − ρ is the log-ratio of the completion, sums in nats; z = max(0, mean over the global
    batch of the log-ratios of mismatched completions) estimates KL(π‖ρ), constant to the gradient.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        desirable_weight: λ_D > 0.
        undesirable_weight: λ_U > 0.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One desirable completion, s = 2, mismatched log-ratio 0.5, β = 0.1, λ_D = 1: z = 0.5 and
        1 − σ(0.15) = 0.4626.

    Source: arXiv:2402.01306, equations 7 and 8 and, for z, section 4.1: each prompt with the
    completion of another row of the batch.

    Deviates: the other row is one of the whole dataset, chosen once, so that the reference scores
    it once; TRL takes z from each micro-batch of each rank, here it is the global batch.

    Settings: β 0.1, learning rate 5e-7 to 5e-6, λ_D n_D / (λ_U n_U) between 1 and 1.5 (the paper,
    section 4.2); at β 0.1 mostly at most 1e-6, global batches of 16 to 128 (the authors, in TRL's
    docs).

    Curves: the loss starts at the mean of λ/2 and falls towards 0; it saturates on both sides, so
    completions that are far off count little.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.KTO

    beta: float = _DEFAULTS["beta"]
    desirable_weight: float = _DEFAULTS["desirable_weight"]
    undesirable_weight: float = _DEFAULTS["undesirable_weight"]

    def __call__(self, logps: CompletionLogps) -> CompletionLoss:
        """Value and implicit reward of each completion; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference, of mismatched completions too.

        Raises:
            ValueError: if log-probs of the reference or of mismatched completions are missing.
        """
        rewards = self.beta * self._logratios(logps)
        baseline = self.beta * self._divergence(logps)
        lead = torch.where(logps.is_desirable, rewards - baseline, baseline - rewards)
        return CompletionLoss(
            # σ(−x) and not 1 − σ(x), which rounds to 0 where x is large.
            values=self._weights(logps) * torch.sigmoid(-lead),
            rewards=rewards.detach(),
            baseline=baseline,
        )

    def _divergence(self, logps: CompletionLogps) -> Float[Tensor, ""]:
        if logps.mismatched is None or logps.mismatched_reference is None:
            raise ValueError(
                f"{self.loss_type} reads the log-probs of mismatched completions, and mismatched "
                "or mismatched_reference is None; score each prompt with the completion of "
                "another row, too"
            )
        return (logps.mismatched - logps.mismatched_reference).detach().mean().clamp(min=0)

    def _weights(self, logps: CompletionLogps) -> Float[Tensor, " completions"]:
        one = torch.ones_like(logps.policy)
        desirable, undesirable = one * self.desirable_weight, one * self.undesirable_weight
        return torch.where(logps.is_desirable, desirable, undesirable)

    def value_at_reference(self, logps: CompletionLogps) -> float | None:
        """Mean over completions where policy equals reference: that of λ/2.

        Args:
            logps: the completions whose labels count. Waits for the device: for a run's start.
        """
        return mean_on_host(self._weights(logps)) / 2
