"""What log-probs of pairs say of models: how often, and by how much, they rank pairs right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

_Lengths = TypeVar("_Lengths", bound=Any)


def equally_long(chosen_lengths: _Lengths, rejected_lengths: _Lengths) -> _Lengths:
    """Which pairs' answers differ in length by at most a tenth of the longer.

    Args:
        chosen_lengths: scored tokens, an array or a tensor of whole numbers.
        rejected_lengths: the same of the other side.
    """
    gap = abs(chosen_lengths - rejected_lengths)
    longer = (chosen_lengths + rejected_lengths + gap) // 2
    return 10 * gap <= longer


@dataclass(frozen=True)
class PairScores:
    """A number of each answer of pairs, fp64: its log-prob in nats, or its reward."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """(pairs,) By how much the chosen answer has more."""
        return self.chosen - self.rejected

    @property
    def accuracy(self) -> float:
        """Share of pairs whose chosen answer has more."""
        return float((self.chosen > self.rejected).mean())

    def rewards_against(self, reference: "PairScores", beta: float) -> "PairScores":
        """Implicit rewards, of log-probs: beta x (policy - reference)."""
        return PairScores(
            beta * (self.chosen - reference.chosen), beta * (self.rejected - reference.rejected)
        )

    def take(self, rows: np.ndarray) -> "PairScores":
        """Those of some pairs."""
        return PairScores(self.chosen[rows], self.rejected[rows])


@dataclass(frozen=True)
class Comparison:
    """A model that is measured against a reference, by their labels."""

    model: str
    reference: str

    def __str__(self) -> str:
        """For people, and the name of its margins."""
        return f"{self.model} against {self.reference}"


@dataclass(frozen=True)
class Ranking:
    """How a measure ranks pairs."""

    chosen: float
    """Its mean over the chosen answers."""
    rejected: float
    margin: float
    """Their difference."""
    accuracy: float
    """Share of pairs with more on the chosen side."""
    accuracy_length_matched: float | None
    """The same over the pairs that are `equally_long`; None where there is none."""

    @classmethod
    def of(cls, scores: PairScores, matched: np.ndarray) -> "Ranking":
        """Means over pairs.

        Args:
            scores: log-probs or rewards, of one pair or more.
            matched: which pairs are `equally_long`.
        """
        chosen, rejected = float(scores.chosen.mean()), float(scores.rejected.mean())
        return cls(
            chosen=chosen,
            rejected=rejected,
            margin=float(scores.margins.mean()),
            accuracy=scores.accuracy,
            accuracy_length_matched=scores.take(matched).accuracy if matched.any() else None,
        )


@dataclass(frozen=True)
class Rewards:
    """Implicit rewards of a model."""

    model: str
    reference: str
    rewards: Ranking
    kl: float | None = None
    """Estimate of KL(model ‖ reference) in nats an answer, from samples; None: not asked for."""
    kl_error: float | None = None
    """Its standard error."""


@dataclass(frozen=True)
class PairsSummary:
    """What models say of some pairs."""

    source: str | None
    """None: all pairs."""
    num_pairs: int
    num_length_matched: int
    """Pairs whose answers are `equally_long`."""
    logps: dict[str, Ranking]
    """By model."""
    rewards: tuple[Rewards, ...]
    """One a comparison; empty without reference."""


@dataclass(frozen=True)
class ScoreSummary:
    """What `preftune score` prints, and writes as JSON."""

    models: dict[str, str]
    """Label -> what the user calls it; the first is `model_name_or_path`."""
    references: dict[str, str]
    beta: float | None
    total: PairsSummary
    sources: tuple[PairsSummary, ...]
    """One a source, the largest first; empty where all pairs are of one."""
    lists: dict[str, int] | None = None
    """Pairs that belong to each list, of which the file may hold fewer; None: not asked for."""

    @property
    def model(self) -> Ranking:
        """Log-probs of `model_name_or_path`."""
        return self.total.logps[next(iter(self.models))]

    @property
    def against_reference(self) -> Rewards:
        """The first comparison: of `model_name_or_path` with the first other reference."""
        return self.total.rewards[0]


def summarise(
    scores: Mapping[str, PairScores],
    rewards: Mapping[Comparison, PairScores],
    matched: np.ndarray,
    source: str | None = None,
) -> PairsSummary:
    """Means over pairs.

    Args:
        scores: log-probs by model.
        rewards: implicit rewards.
        matched: which pairs are `equally_long`.
        source: that all the pairs are of.
    """
    return PairsSummary(
        source=source,
        num_pairs=len(matched),
        num_length_matched=int(matched.sum()),
        logps={label: Ranking.of(held, matched) for label, held in scores.items()},
        rewards=tuple(
            Rewards(pair.model, pair.reference, Ranking.of(held, matched))
            for pair, held in rewards.items()
        ),
    )


def summarise_sources(
    scores: Mapping[str, PairScores],
    rewards: Mapping[Comparison, PairScores],
    matched: np.ndarray,
    sources: Sequence[str],
) -> tuple[PairsSummary, ...]:
    """The same source by source, the largest first; empty where there is one alone.

    Args:
        scores: log-probs by model.
        rewards: implicit rewards.
        matched: which pairs are `equally_long`.
        sources: of the pairs.
    """
    names, inverse, counts = np.unique(sources, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return ()
    found = []
    for index in np.argsort(-counts, kind="stable"):
        rows = np.flatnonzero(inverse == index)
        found.append(
            summarise(
                {label: held.take(rows) for label, held in scores.items()},
                {pair: held.take(rows) for pair, held in rewards.items()},
                matched[rows],
                str(names[index]),
            )
        )
    return tuple(found)


def with_divergences(
    summary: PairsSummary, divergences: Mapping[Comparison, np.ndarray]
) -> PairsSummary:
    """The same with estimates of KL(model ‖ reference).

    Args:
        summary: of all pairs.
        divergences: log model - log reference of answers sampled from the model.
    """

    def estimated(held: Rewards) -> Rewards:
        far = divergences.get(Comparison(held.model, held.reference))
        if far is None:
            return held
        error = float(far.std(ddof=1) / len(far) ** 0.5)
        return replace(held, kl=float(far.mean()), kl_error=error)

    return replace(summary, rewards=tuple(map(estimated, summary.rewards)))
