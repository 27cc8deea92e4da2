"""Which rows a loss that is not finite comes from."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from preftune.batching.batcher import RowBatcher
from preftune.distributed.runtime import Runtime
from preftune.objective import Objective
from preftune.training.step import TrainState


@torch.no_grad()
def losses_alone(
    state: TrainState,
    objective: Objective[Any],
    batcher: RowBatcher,
    runtime: Runtime,
    rows: Sequence[int],
) -> list[float]:
    """The loss of each row by itself, under the weights as they are.

    Args:
        state: of the training, whose weights no bad update has reached.
        objective: of the run.
        batcher: of the training pairs.
        runtime: shares the rows out; every rank calls this.
        rows: of the global batch.
    """
    state.model.eval()
    losses = torch.zeros(len(rows), dtype=torch.float64, device=runtime.device)
    rounds = -(-len(rows) // runtime.data_size)
    for index in range(runtime.data_rank, rounds * runtime.data_size, runtime.data_size):
        own = rows[index : index + 1]
        # A rank without a row runs a dummy, because every rank must take part in the forwards.
        logps = objective.rows(state.model, batcher(own))
        if own:
            output = objective.output(logps, running=state.running)
            loss = output.metrics["loss"]
            losses[index] = loss.total / loss.count
    return runtime.sum_shares(losses).tolist()


def describe_fault(row_ids: Sequence[str], losses: Sequence[float]) -> str:
    """Who is at fault, as far as the rows' own losses tell."""
    bad = [
        f"{row} ({loss})"
        for row, loss in zip(row_ids, losses, strict=True)
        if not math.isfinite(loss)
    ]
    if bad:
        return f"alone, the loss of {', '.join(bad)} is not finite"
    largest = max(range(len(losses)), key=lambda index: abs(losses[index]))
    return (
        "alone, every row's loss is finite, so a gradient is not; the largest loss is "
        f"{losses[largest]:.6g}, of {row_ids[largest]}"
    )
