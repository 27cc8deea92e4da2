"""How far two computations of one log-prob may be apart, and whether stored values are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from preftune.reference.build import Answer, Scorer, ShardSize
from preftune.reference.store import StoredLogps
from preftune.schema import TokenizedExample


def tolerance(lengths: Tensor, logps: Tensor, is_exact: bool) -> Tensor:
    """Nats that a log-prob sum may be off by, where other rows shared its forward.

    Args:
        lengths: scored tokens of each answer, fp64.
        logps: their sums.
        is_exact: whether weights and products are fp32; others round by batch composition, unlikely
            tokens more. SmolLM2 gives an answer of 3 tokens -30.53 or -30.03 nats in bf16 (fp32:
            -30.30).
    """
    if is_exact:
        return 1e-5 * lengths.sqrt() + 1e-6 * logps.abs()
    return lengths.sqrt() * (0.1 + 0.05 * logps.abs() / lengths)


@dataclass(frozen=True)
class Recomputed:
    """One stored answer beside its value now."""

    answer: Answer
    stored: float
    """The sum; or that of the stored tokens, where it is the one further off."""
    now: float
    allowed: float

    @property
    def share(self) -> float:
        """The difference as a part of what is allowed."""
        return abs(self.stored - self.now) / self.allowed


def recompute(
    scorer: Scorer,
    examples: Sequence[TokenizedExample],
    answers: Sequence[Answer],
    stored: Mapping[bytes, StoredLogps],
    *,
    is_exact: bool,
) -> list[Recomputed]:
    """Score stored answers again.

    Args:
        scorer: of the reference.
        examples: the rows that the answers stand in.
        answers: which to look at.
        stored: their values, by key.
        is_exact: as in `tolerance`.
    """
    found = []
    for batch in scorer.batches(answers, ShardSize().tokens):
        values = scorer(examples, batch)
        for answer in batch:
            old, now = stored[answer.key], values[answer.key]
            sums = (old.sum, float(old.per_token.astype(np.float64).sum()))
            worst = max(sums, key=lambda value: abs(value - now.sum))
            length = torch.tensor(len(now.per_token), dtype=torch.float64)
            allowed = tolerance(length, torch.tensor(now.sum), is_exact)
            found.append(Recomputed(answer, worst, now.sum, float(allowed)))
    return found
