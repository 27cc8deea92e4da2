"""Pairs sorted by what models make of their labels: likely mislabelled, too hard, already learnt.

The probability that a pair's label is right is σ(margin) under each model (Bradley-Terry). Its mean
over models is the pair's confidence, as dataset cartography (arXiv:2009.10795) has it over epochs:
what stays low there is hard to learn, and often wrongly labelled.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeAlias, get_args

import numpy as np

from preftune.evaluation.scores import PairScores

ListName: TypeAlias = Literal["mislabelled", "hard", "learnt"]
LISTS: tuple[ListName, ...] = get_args(ListName)

SUSPECTS = 0.1
"""Largest share of pairs that can be likely mislabelled: where the mean margin over several reward
models is lowest, wrong labels are frequent, and hurt (arXiv:2401.06080)."""

LEARNT = 0.9
"""From this probability on a pair is learnt. Its gradient in the dpo loss has the weight
1 - σ(margin): a tenth, or less, of the loss's largest and a fifth of what it began with."""

REWARD_WITHOUT_REFERENCE = 2.0
"""Without reference an answer's reward is this often its mean log-prob a token: SimPO's reward with
the beta of its paper (arXiv:2405.14734)."""


@dataclass(frozen=True)
class SortedPairs:
    """Rows by list; no row is on two, and most are on none."""

    confidence: np.ndarray
    """(pairs,) Mean over models of the probability that the label is right."""
    rows: dict[ListName, np.ndarray]
    """The rows of each list, the clearest case first."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each list."""
        return {name: len(held) for name, held in self.rows.items()}


def sort_pairs(margins: np.ndarray) -> SortedPairs:
    """Sort pairs.

    mislabelled: every model ranks the answers against the label, and the confidence is among the
    lowest `SUSPECTS` of all. hard: of the others, confidence up to a half: the models do not tell
    the answers apart, or only wrongly. learnt: every model is `LEARNT` sure of the label.

    Args:
        margins: (models, pairs) rewards, chosen - rejected.
    """
    margins = np.asarray(margins, dtype=np.float64)
    right = 0.5 * (1.0 + np.tanh(0.5 * margins))  # σ, without overflow
    confidence = right.mean(axis=0)
    rising = np.argsort(confidence, kind="stable")
    lowest = np.zeros(len(rising), dtype=bool)
    lowest[rising[: ceil(SUSPECTS * len(rising))]] = True
    mislabelled = np.logical_and(lowest, (margins < 0).all(axis=0))
    hard = ~mislabelled & (confidence <= 0.5)
    learnt: np.ndarray = np.all(right >= LEARNT, axis=0)
    falling = np.argsort(-confidence, kind="stable")
    return SortedPairs(
        confidence,
        {
            "mislabelled": rising[mislabelled[rising]],
            "hard": rising[hard[rising]],
            "learnt": falling[learnt[falling]],
        },
    )


def rewards_without_reference(
    logps: PairScores, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray
) -> PairScores:
    """What ranks pairs where no reference is given; see `REWARD_WITHOUT_REFERENCE`.

    Args:
        logps: of answers.
        chosen_lengths: scored tokens.
        rejected_lengths: the same of the other side.
    """
    factor = REWARD_WITHOUT_REFERENCE
    return PairScores(
        factor * logps.chosen / chosen_lengths, factor * logps.rejected / rejected_lengths
    )
