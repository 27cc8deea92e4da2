"""Log-probs of answers under a prepared model: what `score` and `quickstart` measure."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import RowSizes, largest, sorted_batches
from preftune.data.table import TokenRows
from preftune.distributed.ranks import ALONE, Ranks
from preftune.evaluation.scores import PairScores
from preftune.model.forward import pair_logps
from preftune.schema import TokenizedExample
from preftune.training.memory import (
    explain_lack_of_memory,
    rows_and_tokens,
    scoring_remedies,
)


def score_examples(
    model: torch.nn.Module,
    examples: TokenRows,
    layout: Layout,
    device: torch.device,
    update: Callable[[int], None] = lambda done: None,
    *,
    rows: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> PairScores:
    """Log-prob sums of every pair under a prepared model; arguments as `answer_logps`."""
    sums = answer_logps(
        model,
        examples,
        examples.sizes,
        layout,
        device,
        update,
        rows=rows,
        max_tokens=max_tokens,
        ranks=ranks,
    )
    return PairScores(sums[:, 0], sums[:, 1])


def answer_logps(
    model: torch.nn.Module,
    examples: Sequence[TokenizedExample],
    sizes: RowSizes,
    layout: Layout,
    device: torch.device,
    update: Callable[[int], None] = lambda done: None,
    *,
    rows: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """(rows, answers) Log-prob sums of every answer under a prepared model, nats, fp64.

    Forwards are the same however many ranks share them, so the values are, too.

    Args:
        model: in eval mode.
        examples: rows with the same number of answers each.
        sizes: theirs.
        layout: how they go through the model.
        device: of the model.
        update: called with the number of rows done.
        rows: most rows of a forward; None for any number.
        max_tokens: most token positions of a forward; None for any number.
        ranks: share the forwards, equally many each; all call this.
    """
    batcher = RowBatcher(examples, None, layout, device)
    batches = sorted_batches(sizes, layout.name, rows=rows, max_tokens=max_tokens)

    @torch.no_grad()
    def forward(batch: list[int]) -> np.ndarray:
        with _explained(batch, sizes, layout, device):
            result = pair_logps(model, batcher(batch).layout)
        return result.sums.view(len(batch), -1).cpu().numpy()

    def compute() -> list[np.ndarray]:
        found, done = [], 0
        for place in range(ranks.rank, len(batches) + ranks.rank, ranks.world_size):
            if place < len(batches):
                found.append(forward(batches[place]))
                done += len(batches[place]) * ranks.world_size
                update(min(done, len(sizes)))
            else:  # for nothing: some engines make every forward one of all ranks
                forward(batches[-1][-1:])
        return found

    mine = compute() if ranks.forwards_together else ranks.together(compute)
    sums = np.full((len(sizes), sizes.lengths.shape[-1] - 1 if len(sizes) else 1), math.nan)
    for rank, values in enumerate(ranks.gather(mine)):
        for batch, value in zip(batches[rank :: ranks.world_size], values, strict=True):
            sums[batch] = value
    return sums


def _explained(
    batch: Sequence[int], sizes: RowSizes, layout: Layout, device: torch.device
) -> AbstractContextManager[None]:
    def heaviest() -> tuple[int, int]:
        return largest([batch], sizes, layout.name)

    return explain_lack_of_memory(
        "while pairs are scored",
        device,
        lambda: f"a micro-batch ({rows_and_tokens(*heaviest())})",
        lambda: scoring_remedies(*heaviest()),
    )
