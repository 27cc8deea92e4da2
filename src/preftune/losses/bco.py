"""BCO on single completions: a binary classifier whose logit is the implicit reward."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.spec import LOSS_SPECS, DPOLossType
from preftune.losses.unpaired import CompletionLogps, CompletionLoss, UnpairedLoss

_DEFAULTS = LOSS_SPECS[DPOLossType.BCO].knobs


@dataclass(frozen=True)
class BCO(UnpairedLoss):
    """Binary classifier optimisation with reward shift.

    value = −logσ(β·s − δ) if desirable; value = −logσ(δ − β·s) if not

    s = π − ρ is the log-ratio of the completion, sums in nats; δ = (m_D + m_U)/2 lies between the
    running means of the rewards β·s of desirable and of undesirable completions, constant to the
    gradient and saved in checkpoints.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        bco_momentum: μ in [0, 1): m ← μ·m + (1−μ)·mean of the global batch, before it is used;
            both start at 0, and a batch without completions of a label leaves its mean.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        First batch: a desirable completion with s = 2 and an undesirable one with s = −1, β = 0.1,
        μ = 0.9: m_D = 0.02, m_U = −0.01, δ = 0.005; values −logσ(0.195) = 0.6004 and
        −logσ(0.105) = 0.6420.

    Source: arXiv:2404.04656, the BCO loss with reward shift.

    Deviates: without the paper's weights for prompts that differ between labels (underlying
    distribution matching). The paper names no momentum: 0.9 is ours. TRL's δ is the plain mean of
    all rewards so far, of both labels together.

    Settings: learning rate 5e-7 (the paper, appendix C, with β 0.01); β 0.1 (TRL).

    Curves: the loss starts at ln 2 and falls; rewards of both labels move apart around δ.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.BCO

    beta: float = _DEFAULTS["beta"]
    bco_momentum: float = _DEFAULTS["bco_momentum"]

    def __call__(self, logps: CompletionLogps) -> CompletionLoss:
        """Value and implicit reward of each completion; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference, and the running means of the batch before.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        rewards = self.beta * self._logratios(logps)
        baseline = self.next_running(logps).mean()
        lead = torch.where(logps.is_desirable, rewards - baseline, baseline - rewards)
        return CompletionLoss(-logsigmoid(lead), rewards.detach(), baseline)

    def next_running(self, logps: CompletionLogps) -> Float[Tensor, " kept"]:
        """m_D and m_U of this batch, detached.

        Args:
            logps: of the whole global batch, with the means of the batch before.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        rewards = (self.beta * self._logratios(logps)).detach()
        masks = torch.stack((logps.is_desirable, ~logps.is_desirable)).to(rewards.dtype)
        counts = masks.sum(dim=1)
        now = (masks * rewards).sum(dim=1) / counts.clamp(min=1)
        before = torch.zeros_like(now) if logps.running is None else logps.running
        mixed = self.bco_momentum * before + (1 - self.bco_momentum) * now
        return torch.where(counts > 0, mixed, before)

    def value_at_reference(self, logps: CompletionLogps) -> float | None:
        """Mean over completions where policy equals reference: ln 2, whatever they are."""
        return math.log(2)
