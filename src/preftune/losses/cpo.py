"""CPO: a preference term without a reference, and fine-tuning on the chosen answer."""

from dataclasses import dataclass
from typing import ClassVar

from preftune.losses.base import Loss, PairLogps, PairLoss, chosen_nll, smoothed_logistic
from preftune.losses.knobs import CPONll
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.CPO].knobs


@dataclass(frozen=True)
class CPO(Loss):
    """Contrastive preference optimisation.

    z = β·(π_w − π_l); value = −(1−ε)·logσ(z) − ε·logσ(−z) − α·π_w

    π is the policy's summed log-prob of a completion, nats. With `cpo_nll` "mean" the last term is
    −α·π_w/|y_w|, |y| the number of scored tokens; with "token" it is −α·π_w/n, n the mean of |y_w|
    over the global batch, which makes it a mean over all its chosen tokens.

    Args:
        beta: β > 0, per nat.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.
        cpo_alpha: α ≥ 0, weight of the fine-tuning term; 0 is DPO against a uniform reference.
        cpo_nll: "sum", "mean" or "token".

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, −10 and −9, β = 0.1: −logσ(−0.1) + 10 = 10.7444; "mean" over 4 tokens: 3.2444.

    Source: arXiv:2401.08417, section 3, equation 3 and the term L_NLL.

    Deviates: no with "sum". The authors' code and TRL take the mean over all tokens of a
    micro-batch, which is "token" where that is the global batch; ε is in their code, not in the
    paper.

    Settings: β 0.1 (the paper, section 4.2), learning rate 1e-4 for LoRA (the authors' code); with
    "sum" the fine-tuning term outweighs the preference by far.

    Curves: the loss starts near the chosen answer's negative log-likelihood: no constant. Both
    log-probs rise with the fine-tuning; look at the margin.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.CPO

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    cpo_alpha: float = _DEFAULTS["cpo_alpha"]
    cpo_nll: CPONll = _DEFAULTS["cpo_nll"]

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × π.

        Args:
            logps: sums of the policy, and lengths ("mean", "token"); the reference is not read.
        """
        nll = -logps.chosen
        if self.cpo_nll != "sum":
            nll = chosen_nll(logps, "sequence" if self.cpo_nll == "mean" else "token")
        margin = self.beta * (logps.chosen - logps.rejected)
        return PairLoss(
            values=smoothed_logistic(margin, self.label_smoothing) + self.cpo_alpha * nll,
            chosen_rewards=(self.beta * logps.chosen).detach(),
            rejected_rewards=(self.beta * logps.rejected).detach(),
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """None: there is no reference, so the first value is known only from the data."""
        return None
