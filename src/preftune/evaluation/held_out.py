"""Loss and implicit rewards on pairs that are not trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from preftune.batching.batcher import RowBatcher
from preftune.distributed.runtime import Runtime
from preftune.evaluation.scores import equally_long
from preftune.losses import PairLogps
from preftune.metrics import MetricSums
from preftune.objective import Objective, gathered

Progress = Callable[[int, int], None]


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    objective: Objective[Any],
    batcher: RowBatcher,
    batches: Sequence[Sequence[int]],
    runtime: Runtime,
    *,
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
        running: what the loss kept of the last global batch; evaluation leaves it as it is.
        progress: called with (pairs done, pairs to do).

    Returns:
        Names as in training (`loss`, `rewards/...`) and those of `length_metrics`, without a
        prefix.
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
    sums = MetricSums()
    for name, metric in output.metrics.items():
        sums.add(name, metric.total, metric.count)
    means = objective.summary(sums.means(lambda totals: totals))
    if not isinstance(logps, PairLogps):
        return means
    return means | length_metrics(
        output.metrics["rewards/chosen"].values,
        output.metrics["rewards/rejected"].values,
        logps.chosen_lengths,
        logps.rejected_lengths,
    )


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
