"""ORPO: fine-tuning and an odds ratio in one loss."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import Loss, PairLogps, PairLoss, chosen_nll
from preftune.losses.knobs import ORPONll
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.ORPO].knobs
_LARGEST_MEAN = -1e-6


@dataclass(frozen=True)
class ORPO(Loss):
    """Odds ratio preference optimisation.

    value = −n̄ − β·logσ(o_w − o_l), o = π̄ − log(1 − e^π̄)

    π̄ = π/|y| is the policy's mean log-prob over a completion's |y| tokens, nats a token, so e^π̄ is
    the geometric mean of its probabilities and o the log of their odds. n̄ is π̄_w; with `orpo_nll`
    "sequence" it is the mean over the tokens of the prompt but the first and of the chosen
    completion.

    Args:
        beta: β > 0: the paper's λ, weight of the odds ratio, without unit.
        orpo_nll: "answer" or "sequence".

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, means log ½ and log ⅓ (odds 1 and ½), β = 0.1: 0.6931 + 0.1·log(1 + ½) = 0.7337.

    Source: arXiv:2403.07691, equations 4, 6 and 7.

    Deviates: a mean log-prob above −1e-6 counts as −1e-6: at 0 the odds are infinite. There, the
    odds ratio has no slope. The fine-tuning term is a mean over one sequence, then over pairs; that
    of the authors' code and of TRL is a mean over all tokens of a micro-batch, prompts included:
    "sequence" where that is one pair.

    Settings: β 0.1, learning rate 5e-6 to 8e-6, from a base model (the paper, appendix C).

    Curves: the first loss depends on the data: no constant. Accuracy rises slowly: fine-tuning
    leads, and both log-probs rise at first.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.ORPO

    beta: float = _DEFAULTS["beta"]
    orpo_nll: ORPONll = _DEFAULTS["orpo_nll"]

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt's tokens are trained on."""
        return self.orpo_nll == "sequence"

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × o.

        Args:
            logps: sums of the policy, and lengths, and those of the prompt ("sequence"); the
                reference is not read.

        Raises:
            ValueError: if the prompt's are missing.
        """
        chosen = logps.chosen / logps.chosen_lengths
        rejected_odds = _log_odds(logps.rejected / logps.rejected_lengths)
        chosen_odds = _log_odds(chosen)
        return PairLoss(
            values=self._nll(logps) - self.beta * logsigmoid(chosen_odds - rejected_odds),
            chosen_rewards=(self.beta * chosen_odds).detach(),
            rejected_rewards=(self.beta * rejected_odds).detach(),
        )

    def _nll(self, logps: PairLogps) -> Float[Tensor, " pairs"]:
        if self.orpo_nll == "answer":
            return chosen_nll(logps, "sequence")
        if logps.prompt is None or logps.prompt_lengths is None:
            raise ValueError(
                'orpo with orpo_nll "sequence" reads the prompt\'s log-probs, and prompt or '
                "prompt_lengths is None; score the prompts, too"
            )
        tokens = logps.prompt_lengths + logps.chosen_lengths
        return -(logps.prompt + logps.plain[0]) / tokens

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """None: there is no reference, so the first value is known only from the data."""
        return None


def _log_odds(mean_logps: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    bounded = mean_logps.clamp(max=_LARGEST_MEAN)
    return bounded - torch.log(-torch.expm1(bounded))
