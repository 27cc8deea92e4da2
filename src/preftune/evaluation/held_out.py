"""Loss and implicit rewards on pairs that are not trained on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preftune.batching.batcher import RowBatcher
from preftune.distributed.runtime import Runtime
from preftune.evaluation.scores import equally_long
from preftune.losses import PairLogps
from preftune.metrics import MetricSums
from preftune.objective import Objective, RowMetric, gathered

Progress = Callable[[int, int], None]
MOST_SOURCES = 32
"""Of more sources than this, the largest have metrics of their own."""


def rows_by_source(sources: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of each source, the largest first; empty where all are of one.

    Args:
        sources: (rows,) names.

    Returns:
        At most `MOST_SOURCES` of them.
    """
    names, at, counts = np.unique(np.array(sources), return_inverse=True, return_counts=True)
    if len(names) == 1:
        return {}
    largest = np.argsort(-counts, kind="stable")[:MOST_SOURCES]
    return {str(names[number]): np.flatnonzero(at == number) for number in largest}


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    objective: Objective[Any],
    batcher: RowBatcher,
    batches: Sequence[Sequence[int]],
    runtime: Runtime,
    *,
    by_source: Mapping[str, np.ndarray] | None = None,
    running: Tensor | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means over all pairs of the batcher's dataset, each pair counted once.

    The loss sees all pairs together, as one global batch.

    Args:
        model: prepared; put into eval mode here and back into its mode afterwards.
        objective: the loss of the run.
        batcher: holds the pairs and their reference values.
        batches: every row of the dataset once, a forward each.
        runtime: shares the batches out over ranks.
        by_source: rows that get metrics of their own, too, by name.
        running: what the loss kept of the last global batch; evaluation leaves it as it is.
        progress: called with (pairs done, pairs to do).

    Returns:
        Names as in training (`loss`, `rewards/...`) and those of `length_metrics`, without a
        prefix; those of a source behind `source/<name>/`.
    """
    # Every rank runs the same number of forwards; short ranks run dummies that count nothing.
    per_rank = -(-len(batches) // runtime.data_size)
    mine = batches[runtime.data_rank :: runtime.data_size]
    was_training = model.training
    model.eval()
    parts = []
    done, num_pairs = 0, len(batcher.examples)
    for rows in [*mine, *[[]] * (per_rank - len(mine))]:
        parts.append(objective.rows(model, batcher(rows)))
        done += len(rows) * runtime.data_size
        if progress is not None:
            progress(min(done, num_pairs), num_pairs)
    model.train(was_training)
    # The type is given, because a rank may have no rows.
    own = [row for rows in mine for row in rows]
    slots = torch.tensor(own, dtype=torch.int64, device=runtime.device)
    logps = gathered(parts, slots, num_pairs, runtime.sum_shares)
    output = objective.output(logps, running=running)
    lengths = None
    if isinstance(logps, PairLogps):
        lengths = logps.chosen_lengths, logps.rejected_lengths
    found = _means(output.metrics, lengths, objective)
    for name, rows in (by_source or {}).items():
        at = torch.as_tensor(rows, device=runtime.device)
        metrics = {key: metric.at(at) for key, metric in output.metrics.items()}
        own = lengths and (lengths[0][at], lengths[1][at])
        found |= {f"source/{name}/{k}": v for k, v in _means(metrics, own, objective).items()}
    return found


def _means(
    metrics: Mapping[str, RowMetric],
    lengths: tuple[Tensor, Tensor] | None,
    objective: Objective[Any],
) -> dict[str, float]:
    sums = MetricSums()
    for name, metric in metrics.items():
        sums.add(name, metric.total, metric.count)
    means = objective.summary(sums.means(lambda totals: totals))
    if lengths is None:
        return means
    chosen, rejected = metrics["rewards/chosen"].values, metrics["rewards/rejected"].values
    return means | length_metrics(chosen, rejected, *lengths)


def length_metrics(
    chosen_rewards: Float[Tensor, " pairs"],
    rejected_rewards: Float[Tensor, " pairs"],
    chosen_lengths: Int[Tensor, " pairs"],
    rejected_lengths: Int[Tensor, " pairs"],
) -> dict[str, float]:
    """Whether the reward follows length: a policy can learn that alone.

    Args:
        chosen_rewards: implicit rewards.
        rejected_rewards: the same of the other side.
        chosen_lengths: scored tokens.
        rejected_lengths: the same of the other side.

    Returns:
        `rewards/length_correlation`: Pearson's, between reward and length, over all answers; left
        out where one of them does not vary. `rewards/accuracies_length_matched`: accuracy over the
        pairs whose answers are `equally_long`, left out where there is none, and
        `rewards/length_matched`, the share of such pairs.
    """
    lengths = torch.stack((chosen_lengths, rejected_lengths)).double()
    rewards = torch.stack((chosen_rewards, rejected_rewards)).double()
    matched = equally_long(chosen_lengths, rejected_lengths)
    metrics = {"rewards/length_matched": float(matched.double().mean())}
    if matched.any():
        right = (rewards[0] > rewards[1])[matched]
        metrics["rewards/accuracies_length_matched"] = float(right.double().mean())
    if rewards.std() > 0 and lengths.std() > 0:
        both = torch.stack((rewards.flatten(), lengths.flatten()))
        metrics["rewards/length_correlation"] = float(torch.corrcoef(both)[0, 1])
    return metrics
