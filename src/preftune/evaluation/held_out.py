"""Loss and implicit rewards on pairs that are not trained on."""

from collections.abc import Callable

import torch
from torch import nn

from preftune.batching.sampler import length_sorted_batches
from preftune.distributed.runtime import Runtime
from preftune.metrics import MetricSums
from preftune.objective import PairBatcher, PreferenceObjective

Progress = Callable[[int, int], None]


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    objective: PreferenceObjective,
    batcher: PairBatcher,
    batch_size: int,
    runtime: Runtime,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Means over all pairs of the batcher's dataset, each pair counted once.

    Args:
        model: prepared; put into eval mode here and back into its mode afterwards.
        objective: the loss of the run.
        batcher: holds the pairs and their reference values.
        batch_size: pairs a forward.
        runtime: shares the batches out over ranks.
        progress: called with (pairs done, pairs to do).

    Returns:
        Names as in training (`loss`, `rewards/...`), without a prefix.
    """
    lengths = [max(example.lengths) for example in batcher.examples]
    batches = length_sorted_batches(lengths, batch_size)
    # Every rank runs the same number of forwards; short ranks run dummies that count nothing.
    per_rank = -(-len(batches) // runtime.world_size)
    mine = batches[runtime.rank :: runtime.world_size]
    metrics = MetricSums()
    was_training = model.training
    model.eval()
    done = 0
    for rows in mine + [[]] * (per_rank - len(mine)):
        output = objective(model, batcher(rows))
        for name, total in output.sums.items():
            metrics.add(name, total, output.count)
        done += len(rows) * runtime.world_size
        if progress is not None:
            progress(min(done, len(lengths)), len(lengths))
    model.train(was_training)
    return metrics.means(runtime.all_reduce)
