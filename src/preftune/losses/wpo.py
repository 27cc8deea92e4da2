"""WPO: DPO weighted by how likely the policy is to write the pair itself."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import Loss, PairLogps, PairLoss, mean_on_host, smoothed_logistic
from preftune.losses.knobs import WPOAlignment, WPOCap
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.WPO].knobs


@dataclass(frozen=True)
class WPO(Loss):
    """Weighted preference optimisation.

    z = β·(s_w − s_l), v = min(1, e^(a_w + a_l)); value = v·(−(1−ε)·logσ(z) − ε·logσ(−z))

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`; the weight v is constant
    to the gradient. With p the policy's probabilities and means over scored tokens,

    - `sampled`: a = mean_t(log p(y_t) − log Σ_v p(v)²), near 0 for text the policy could write;
    - `none`: a = mean_t log p(y_t) = π/|y|, never above 0, so that the cap does nothing.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.
        wpo_alignment: "sampled" or "none".
        wpo_cap: "one", or "none" for a weight that may pass 1.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, z = 0, alignments −0.5 and −0.5: v = e^−1 = 0.3679, value 0.3679·ln 2 = 0.2550.

    Source: arXiv:2406.11827, equation 2 and, for the two
    alignments, "Weight Alignment"; the cap at 1, ε and the detached weight as in the authors'
    code (github.com/wzhouad/WPO, scripts/run_wpo.py).

    Deviates: greedy alignment, the paper's third, is not offered. TRL has no cap: `wpo_cap` "none".
    The values are averaged over pairs, not over the weights' sum, as in the authors' code.

    Settings: β 0.01 in the paper (section 4), 0.1 here as for dpo; learning rate as for dpo (ours).

    Curves: as dpo's, times the mean weight, which falls as answers leave what the policy writes.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.WPO

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    wpo_alignment: WPOAlignment = _DEFAULTS["wpo_alignment"]
    wpo_cap: WPOCap = _DEFAULTS["wpo_cap"]

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
        """v of each pair, above 0 (or 0 where exp underflows), at most 1 if capped; detached.

        Args:
            logps: the alignments ("sampled") or sums and lengths ("none") are read.

        Raises:
            ValueError: if the alignments are read and missing.
        """
        if not self.reads_alignment:
            plain_chosen, plain_rejected = logps.plain
            chosen = plain_chosen / logps.chosen_lengths
            rejected = plain_rejected / logps.rejected_lengths
        elif logps.chosen_alignment is None or logps.rejected_alignment is None:
            raise ValueError(
                f"{self.loss_type} with wpo_alignment 'sampled' reads chosen_alignment and "
                "rejected_alignment, and one is None; compute both or set wpo_alignment to 'none'"
            )
        else:
            chosen, rejected = logps.chosen_alignment, logps.rejected_alignment
        exponent = (chosen + rejected).detach()
        # Capped before exp, so that nothing overflows.
        return exponent.clamp(max=0).exp() if self.wpo_cap == "one" else exponent.exp()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2 × the mean weight.

        Args:
            logps: the pairs whose weights count. Waits for the device: for the start of a run.
        """
        return math.log(2) * mean_on_host(self.weights(logps))
