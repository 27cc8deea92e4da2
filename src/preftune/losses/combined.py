"""Several losses at once, and fine-tuning beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import Loss, PairLogps, PairLoss, chosen_nll, mean_on_host
from preftune.losses.knobs import MeanOver


@dataclass(frozen=True)
class Combined(Loss):
    """Weighted sum of losses, plus the chosen completion's negative log-likelihood.

    value = Σ_k weight_k·value_k − sft_weight·π_w/n

    π_w is the policy's summed log-prob of the chosen completion, nats, whatever its tokens weigh in
    the losses (`ld_alpha`). n is the number of its scored tokens |y_w|: a mean over each completion
    first, then over pairs. With `sft_reduction` "token", n is the mean of |y_w| over the global
    batch, which makes the term a mean over all its chosen tokens.

    Args:
        losses: at least one; the implicit rewards are those of the first.
        weights: one above 0 for each loss.
        sft_weight: 0 (off) or more, per nat a token.
        sft_reduction: "sequence" or "token".

    Raises:
        ValueError: if losses and weights differ in number, or a weight is out of range.

    Example:
        One pair, −10 over 4 tokens, dpo's value 0.5544: with sft_weight 0.2, 0.5544 + 0.5 = 1.0544.

    Source: MPO, arXiv:2411.10442, section 3.2 (0.8 dpo, 0.2 bco_pair, 1 fine-tuning); fine-tuning
    beside dpo: RPO, arXiv:2404.19733, equation 1.

    Deviates: TRL's fine-tuning term is "token", but of a micro-batch.
    """

    losses: tuple[Loss, ...]
    weights: tuple[float, ...]
    sft_weight: float = 0.0
    sft_reduction: MeanOver = "sequence"

    def __post_init__(self) -> None:
        """Check numbers; each loss has checked its own knobs."""
        if not self.losses or len(self.losses) != len(self.weights):
            raise ValueError(
                f"{len(self.losses)} losses and {len(self.weights)} weights; give one weight each"
            )
        if min(self.weights) <= 0 or self.sft_weight < 0:
            raise ValueError(
                f"weights are {self.weights} and sft_weight is {self.sft_weight}; weights must be "
                "above 0 and sft_weight at least 0"
            )

    @property
    def reads_alignment(self) -> bool:
        """Whether one of the losses does."""
        return any(loss.reads_alignment for loss in self.losses)

    @property
    def reads_prompt(self) -> bool:
        """Whether one of the losses does."""
        return any(loss.reads_prompt for loss in self.losses)

    @property
    def needs_global_batch(self) -> bool:
        """Whether one of the losses does."""
        return any(loss.needs_global_batch for loss in self.losses)

    def next_running(self, logps: PairLogps) -> Float[Tensor, " kept"] | None:
        """That of the one loss that keeps something (beta_dpo; no loss is there twice).

        Args:
            logps: of the whole global batch.
        """
        kept = (loss.next_running(logps) for loss in self.losses)
        return next((running for running in kept if running is not None), None)

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value of each pair, and the implicit rewards of the first loss.

        Args:
            logps: whatever the losses read.

        Raises:
            ValueError: if something is missing that a loss reads.
        """
        results = [loss(logps) for loss in self.losses]
        values = results[0].values * self.weights[0]
        for result, weight in zip(results[1:], self.weights[1:], strict=True):
            values = values + result.values * weight
        if self.sft_weight:
            values = values + self.sft_weight * chosen_nll(logps, self.sft_reduction)
        return PairLoss(values, results[0].chosen_rewards, results[0].rejected_rewards)

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference; None if a loss knows none.

        Args:
            logps: the pairs, whose likelihood counts. Waits for the device: for the start of a run.
        """
        values = [loss.value_at_reference(logps) for loss in self.losses]
        if None in values:
            return None
        fine_tuning = mean_on_host(chosen_nll(logps, self.sft_reduction)) if self.sft_weight else 0
        weighted = zip(self.weights, values, strict=True)
        return sum(w * v for w, v in weighted if v is not None) + self.sft_weight * fine_tuning


def combine(
    losses: Sequence[Loss],
    weights: Sequence[float],
    sft_weight: float,
    sft_reduction: MeanOver = "sequence",
) -> Loss:
    """One loss of several; one of weight 1 without fine-tuning stays itself.

    Args:
        losses: at least one.
        weights: one for each.
        sft_weight: weight of the chosen completion's negative log-likelihood.
        sft_reduction: what its mean is over.

    Raises:
        ValueError: as `Combined`.
    """
    if len(losses) == 1 and list(weights) == [1.0] and sft_weight == 0:
        return losses[0]
    return Combined(tuple(losses), tuple(weights), sft_weight, sft_reduction)
