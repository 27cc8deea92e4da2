"""What losses on single labelled completions take and give."""

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from preftune.losses.base import AnyLoss, check_shapes


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probs of labelled completions under the policy and the reference.

    All tensors but `running` have one entry a completion.

    Raises:
        ValueError: if a tensor's shape is another than that of `policy`, which would broadcast.
    """

    policy: Float[Tensor, " completions"]
    """Policy: sum of per-token log-probs over the scored tokens of the completion, nats."""
    lengths: Int[Tensor, " completions"]
    """Scored tokens, at least 1."""
    is_desirable: Bool[Tensor, " completions"]
    """The label."""
    reference: Float[Tensor, " completions"] | None = None
    """Reference: as `policy`. A constant: no gradient flows to it."""
    mismatched: Float[Tensor, " completions"] | None = None
    """Policy: of the prompt with the completion of another row. A constant to the gradient."""
    mismatched_reference: Float[Tensor, " completions"] | None = None
    """Reference: as `mismatched`."""
    weight: Float[Tensor, " completions"] | None = None
    """How much the completion counts; None is 1. Losses leave it to their caller."""
    running: Float[Tensor, " kept"] | None = None
    """What `UnpairedLoss.next_running` gave for the global batch before; None for the first."""

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast."""
        check_shapes(self, "policy", "completion")


@dataclass(frozen=True)
class CompletionLoss:
    """One value and one implicit reward a completion; nothing is reduced."""

    values: Float[Tensor, " completions"]
    """What is minimised, with gradient."""
    rewards: Float[Tensor, " completions"]
    """Implicit reward, β × log-ratio; detached."""
    baseline: Float[Tensor, ""]
    """The reward above which the policy takes a completion for desirable; detached."""


class UnpairedLoss(AnyLoss):
    """A loss on single labelled completions; each is a frozen dataclass on top of this.

    It sees the global batch in one call. No `__call__` waits for the device.
    """

    @abstractmethod
    def __call__(self, logps: CompletionLogps) -> CompletionLoss:
        """Value and implicit reward of each completion.

        Args:
            logps: of the whole global batch.

        Raises:
            ValueError: if something is missing that the loss reads.
        """

    @abstractmethod
    def value_at_reference(self, logps: CompletionLogps) -> float | None:
        """Mean over completions where policy equals reference.

        Args:
            logps: the completions. Waits for the device: for the start of a run.
        """

    def next_running(self, logps: CompletionLogps) -> Float[Tensor, " kept"] | None:
        """What the next global batch gets as `CompletionLogps.running`, detached; None if nothing.

        Args:
            logps: of the whole global batch.
        """
        return None

    def _logratios(self, logps: CompletionLogps) -> Float[Tensor, " completions"]:
        """Policy − reference, nats."""
        if logps.reference is None:
            raise ValueError(
                f"{self.loss_type} reads the reference's log-probs, and reference is None; score "
                "the completions with the reference first"
            )
        return logps.policy - logps.reference.detach()
