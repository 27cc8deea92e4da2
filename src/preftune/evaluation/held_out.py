"""Loss and implicit rewards on pairs that are not trained on."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from preftune.distributed.runtime import Runtime
from preftune.metrics import MetricSums
from preftune.objective import PairBatcher, PreferenceObjective

Progress = Callable[[int, int], None]


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    objective: PreferenceObjective,
    batcher: PairBatcher,
    batches: Sequence[Sequence[int]],
    runtime: Runtime,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means over all pairs of the batcher's dataset, each pair counted once.

    Args:
        model: prepared; put into eval mode here and back into its mode afterwards.
        objective: the loss of the run.
        batcher: holds the pairs and their reference values.
        batches: every row of the dataset once, a forward each.
        runtime: shares the batches out over ranks.
        progress: called with (pairs done, pairs to do).

    Returns:
        Names as in training (`loss`, `rewards/...`), without a prefix.
    """
    # Every rank runs the same number of forwards; short ranks run dummies that count nothing.
    per_rank = -(-len(batches) // runtime.world_size)
    mine = batches[runtime.rank :: runtime.world_size]
    metrics = MetricSums()
    was_training = model.training
    model.eval()
    done, num_pairs = 0, len(batcher.examples)
    for rows in [*mine, *[[]] * (per_rank - len(mine))]:
        output = objective(model, batcher(rows))
        for name, total in output.sums.items():
            metrics.add(name, total, output.count)
        done += len(rows) * runtime.world_size
        if progress is not None:
            progress(min(done, num_pairs), num_pairs)
    model.train(was_training)
    return metrics.means(runtime.all_reduce)
