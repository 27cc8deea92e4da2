"""WPO: DPO weighted by how likely the policy is to write the pair itself."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import LossBase, PairLogps, PairLoss, mean_on_host, smoothed_logistic
from preftune.losses.spec import LOSS_SPECS, DPOLossType, WPOAlignment

_DEFAULTS = LOSS_SPECS[DPOLossType.WPO].knobs


@dataclass(frozen=True)
class WPO(LossBase):
    """Weighted preference optimisation.

    value = w × (−(1−ε)·logσ(βh) − ε·logσ(−βh)), h as in `DPO`; w = min(1, exp(a_w + a_l)) is
    a constant to the gradient. With p the policy's probabilities and means over scored tokens,

    - `sampled`: a = mean_t(log p(y_t) − log Σ_v p(v)²), near 0 for text the policy could write;
    - `none`: a = mean_t log p(y_t) = π/|y|, never above 0, so that the cap does nothing.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.
        wpo_alignment: "sampled" or "none".

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, h = 0, alignments −0.5 and −0.5: w = e^−1 = 0.3679, value 0.3679·ln 2 = 0.2550.

    Source: arXiv:2406.11827, section "Weighted Preference Optimization" and, for the two
    alignments, "Weight Alignment"; the cap at 1, ε and the detached weight as in the authors'
    code (github.com/wzhouad/WPO, scripts/run_wpo.py).

    Deviates: greedy alignment, the paper's third, is not offered. TRL's has no cap. The values
    are averaged over pairs, not over Σw, as in the authors' code.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.WPO

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    wpo_alignment: WPOAlignment = _DEFAULTS["wpo_alignment"]

    @property
    def reads_alignment(self) -> bool:
        """Whether, with these knobs, the loss reads `PairLogps.*_alignment`."""
        return self.wpo_alignment == "sampled"

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ), not weighted.

        Args:
            logps: sums of policy and reference, and alignments ("sampled") or lengths ("none").

        Raises:
            ValueError: if the reference's log-probs or the alignments it reads are missing.
        """
        chosen, rejected = self._logratios(logps)
        values = smoothed_logistic(self.beta * (chosen - rejected), self.label_smoothing)
        return PairLoss(
            values=self.weights(logps) * values,
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    def weights(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        """w of each pair, above 0 (or 0 where exp underflows) and at most 1; detached.

        Args:
            logps: the alignments ("sampled") or sums and lengths ("none") are read.

        Raises:
            ValueError: if the alignments are read and missing.
        """
        if not self.reads_alignment:
            chosen = logps.chosen / logps.chosen_lengths
            rejected = logps.rejected / logps.rejected_lengths
        elif logps.chosen_alignment is None or logps.rejected_alignment is None:
            raise ValueError(
                f"{self.loss_type} with wpo_alignment 'sampled' reads chosen_alignment and "
                "rejected_alignment, and one is None; compute both or set wpo_alignment to 'none'"
            )
        else:
            chosen, rejected = logps.chosen_alignment, logps.rejected_alignment
        # Capped before exp, so that nothing overflows.
        return (chosen + rejected).detach().clamp(max=0).exp()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2 × the mean weight.

        Args:
            logps: the pairs whose weights count. Waits for the device: for the start of a run.
        """
        return math.log(2) * mean_on_host(self.weights(logps))
