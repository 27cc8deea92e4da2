"""Supervised fine-tuning: the negative log-likelihood of answers, whose mean is over tokens."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from preftune.losses.base import check_shapes


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probs of answers that are to be learnt.

    All tensors have one entry an answer.

    Raises:
        ValueError: if a tensor's shape is another than that of `policy`, which would broadcast.
    """

    policy: Float[Tensor, " answers"]
    """Sum of per-token log-probs over the scored tokens of the answer, nats."""
    lengths: Int[Tensor, " answers"]
    """Scored tokens, at least 1."""
    weight: Float[Tensor, " answers"] | None = None
    """How much the answer's tokens count; None is 1. The loss leaves it to its caller."""

    def __post_init__(self) -> None:
        """Refuse shapes that would broadcast."""
        check_shapes(self, "policy", "answer")


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """Cross-entropy of the scored tokens.

    value = −π

    π is the log-prob of the answer, the sum over its scored tokens in nats. The sum of the values
    of a global batch is divided by the number of its scored tokens, so that each token counts the
    same, whichever row it stands in.

    Example:
        Two answers of 1 and 3 tokens, each token of probability 1/2: values 0.693 and 2.079, and
        (0.693 + 2.079) / 4 = ln 2.
    """

    reads_alignment: ClassVar[bool] = False
    needs_global_batch: ClassVar[bool] = False

    def __call__(self, logps: AnswerLogps) -> Float[Tensor, " answers"]:
        """One value an answer; nothing is reduced.

        Args:
            logps: of the answers.
        """
        return -logps.policy
