"""What every loss takes and gives, and the few lines that they share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.f_divergence import divergence_score
from preftune.losses.knobs import FDivergence, MeanOver
from preftune.losses.spec import LOSS_SPECS, DPOLossType


def check_shapes(logps: object, first: str, thing: str) -> None:
    """Refuse shapes that would broadcast, at the cost of a few comparisons on the host.

    Args:
        logps: a dataclass of tensors with one entry a thing, `running`, and numbers.
        first: the name of one of them.
        thing: what it has an entry for.

    Raises:
        ValueError: if a tensor's shape is another than that of the first.
    """
    shape = getattr(logps, first).shape
    for name, value in vars(logps).items():
        if name != "running" and isinstance(value, Tensor) and value.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} where {first} has {tuple(shape)}; "
                f"give one entry a {thing}"
            )


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of a batch of pairs under the policy and, where needed, the reference.

    All tensors have one entry a pair. Policy and reference may differ in dtype: torch promotes.

    Raises:
        ValueError: if a tensor's shape is another than that of `chosen`, which would broadcast.
    """

    chosen: Float[Tensor, " pairs"]
    """Policy: sum of per-token log-probs over the scored tokens of the chosen completion, nats;
    with `ld_alpha` tokens beyond the length of the pair's shorter completion weigh less in it."""
    rejected: Float[Tensor, " pairs"]
    """The same of the rejected completion."""
    chosen_lengths: Int[Tensor, " pairs"]
    """Scored tokens of the chosen completion, at least 1."""
    rejected_lengths: Int[Tensor, " pairs"]
    """The same of the rejected completion."""
    ref_chosen: Float[Tensor, " pairs"] | None = None
    """Reference: as `chosen`. A constant: no gradient flows to it."""
    ref_rejected: Float[Tensor, " pairs"] | None = None
    """Reference: as `rejected`."""
    chosen_alignment: Float[Tensor, " pairs"] | None = None
    """Mean over the chosen completion's scored tokens of log p(y_t) − log Σ_v p(v)², in nats."""
    rejected_alignment: Float[Tensor, " pairs"] | None = None
    """The same of the rejected completion."""
    margin: Float[Tensor, " pairs"] | None = None
    """By how much chosen is said to beat rejected, in units of reward."""
    weight: Float[Tensor, " pairs"] | None = None
    """How much the pair counts; None is 1. Losses leave it to their caller."""
    plain_chosen: Float[Tensor, " pairs"] | None = None
    """`chosen` before tokens were weighted (`ld_alpha`); None where they are not."""
    plain_rejected: Float[Tensor, " pairs"] | None = None
    """The same of the rejected completion."""
    prompt: Float[Tensor, " pairs"] | None = None
    """Policy: sum of the log-probs of the prompt's tokens but the first, nats; None if not read."""
    prompt_lengths: Int[Tensor, " pairs"] | None = None
    """Tokens of the prompt but the first."""
    mean_chosen_length: float | None = None
    """Mean of `chosen_lengths` over the global batch that these pairs are part of; None: they are
    all of it."""
    running: Float[Tensor, " kept"] | None = None
    """What `Loss.next_running` gave for the global batch before; None for the first."""

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast."""
        check_shapes(self, "chosen", "pair")

    @property
    def plain(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """The policy's sums of both sides with every token at weight 1: its log-likelihoods."""
        return (
            self.chosen if self.plain_chosen is None else self.plain_chosen,
            self.rejected if self.plain_rejected is None else self.plain_rejected,
        )


@dataclass(frozen=True)
class PairLoss:
    """One value and two implicit rewards a pair; nothing is reduced."""

    values: Float[Tensor, " pairs"]
    """What is minimised, with gradient."""
    chosen_rewards: Float[Tensor, " pairs"]
    """Implicit reward of the chosen completion: beta × the loss's own quantity; detached."""
    rejected_rewards: Float[Tensor, " pairs"]
    """The same of the rejected completion."""


class AnyLoss(ABC):
    """What losses on pairs and on single completions share."""

    loss_type: ClassVar[DPOLossType]

    def __post_init__(self) -> None:
        """Check every knob's range.

        Raises:
            ValueError: naming every knob out of range.
        """
        spec = LOSS_SPECS[self.loss_type]
        problems = [spec.knob(name).problem(getattr(self, name)) for name in spec.knobs]
        found = [problem for problem in problems if problem]
        if found:
            raise ValueError(f"{self.loss_type}: " + "; ".join(found))

    @property
    def reads_alignment(self) -> bool:
        """Whether, with these knobs, the loss reads `PairLogps.*_alignment`."""
        return LOSS_SPECS[self.loss_type].reads_alignment

    @property
    def reads_prompt(self) -> bool:
        """Whether, with these knobs, the loss reads `PairLogps.prompt`."""
        return False

    @property
    def needs_global_batch(self) -> bool:
        """Whether a pair's value depends on the others: give the global batch in one call."""
        return LOSS_SPECS[self.loss_type].needs_global_batch


class Loss(AnyLoss):
    """A loss on pairs; each is a frozen dataclass on top of this, with its knobs as fields.

    No `__call__` of a loss waits for the device: it reads no tensor's value on the host.
    """

    @abstractmethod
    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair.

        Args:
            logps: of the pairs; what the loss does not read may be missing.

        Raises:
            ValueError: if something is missing that the loss reads.
        """

    @abstractmethod
    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference; None if no constant is known.

        Args:
            logps: the pairs. Where they matter this waits for the device: for the start of a run.
        """

    def next_running(self, logps: PairLogps) -> Float[Tensor, " kept"] | None:
        """What the next global batch gets as `PairLogps.running`, detached; None if nothing.

        A run keeps it beside the optimizer's state and saves it in checkpoints.

        Args:
            logps: of the whole global batch.
        """
        return None

    def _logratios(
        self, logps: PairLogps
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Policy − reference of the chosen and of the rejected sums, nats."""
        if logps.ref_chosen is None or logps.ref_rejected is None:
            raise ValueError(
                f"{self.loss_type} reads the reference's log-probs, and ref_chosen or "
                "ref_rejected is None; score the pairs with the reference first"
            )
        return (
            logps.chosen - logps.ref_chosen.detach(),
            logps.rejected - logps.ref_rejected.detach(),
        )


class MarginLoss(Loss):
    """A loss that sees a pair only through z = β·(f'(s_w) − f'(s_l)), s the log-ratios.

    f is the divergence from the reference (`f_divergence`); with reverse_kl, f'(s) = s. The
    implicit reward of a completion is β·f'(s).
    """

    beta: float
    f_divergence: FDivergence
    f_divergence_alpha: float

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × f'(π − ρ).

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = (
            divergence_score(logratio, self.f_divergence, self.f_divergence_alpha)
            for logratio in self._logratios(logps)
        )
        return PairLoss(
            values=self._of_margin(self.beta * (chosen - rejected)),
            chosen_rewards=(self.beta * chosen).detach(),
            rejected_rewards=(self.beta * rejected).detach(),
        )

    @abstractmethod
    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """The value, given z."""


class RewardLoss(Loss):
    """A loss that sees a pair only through its implicit rewards β·s_w and β·s_l.

    s = π − ρ is the log-ratio of a completion, sums in nats.
    """

    beta: float

    def __call__(self, logps: PairLogps) -> PairLoss:
        """Value and implicit rewards of each pair; a reward is β × (π − ρ).

        Args:
            logps: sums of policy and reference.

        Raises:
            ValueError: if the reference's log-probs are missing.
        """
        chosen, rejected = (self.beta * logratio for logratio in self._logratios(logps))
        return PairLoss(self._of_rewards(chosen, rejected), chosen.detach(), rejected.detach())

    @abstractmethod
    def _of_rewards(
        self, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        """The value, given both rewards."""


def smoothed_logistic(
    logits: Float[Tensor, " pairs"], label_smoothing: float
) -> Float[Tensor, " pairs"]:
    """−(1−ε)·logσ(z) − ε·logσ(−z): the loss of a label that is wrong with probability ε.

    Args:
        logits: z, the log-odds that chosen beats rejected.
        label_smoothing: ε, in [0, 0.5).

    Returns:
        One value a pair; log 2 at z = 0 for every ε. Linear, not infinite, for large |z|.
    """
    # Left out at ε = 0, not multiplied by it: 0·inf would be nan where z overflows (fp16).
    if label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def chosen_nll(logps: PairLogps, mean_over: MeanOver) -> Float[Tensor, " pairs"]:
    """The chosen completions' negative log-likelihood a token, to be averaged over pairs.

    Whatever tokens weigh elsewhere (`ld_alpha`), here each counts.

    Args:
        logps: sums of the policy, and lengths.
        mean_over: "sequence": −π_w/|y_w|. "token": −π_w/mean|y_w|, whose mean over the pairs of the
            global batch is the mean over all its chosen tokens.

    Returns:
        One value a pair, nats a token.
    """
    nll = -logps.plain[0]
    if mean_over == "sequence":
        return nll / logps.chosen_lengths
    if logps.mean_chosen_length is not None:
        return nll / logps.mean_chosen_length
    return nll / logps.chosen_lengths.double().mean()


def of_same_rank(
    values: Float[Tensor, " pairs"], others: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """For each of `values` the one of `others` that has the same rank among them.

    Args:
        values: of a batch; only their order is read.
        others: of the same batch; gradients flow to them.
    """
    ranks = values.detach().argsort().argsort()
    return torch.sort(others).values[ranks]


def mean_on_host(values: Float[Tensor, " pairs"]) -> float:
    """Mean over pairs in float64; waits for the device."""
    return values.detach().to("cpu", torch.float64).mean().item()
