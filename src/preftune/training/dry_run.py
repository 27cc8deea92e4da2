"""The heaviest micro-batch of a run, tried before the first step.

A run whose longest pairs come late would otherwise fail after hours.
"""

from collections.abc import Sequence
from typing import Any

import torch

from preftune.batching.batcher import RowBatcher
from preftune.distributed.runtime import Runtime
from preftune.objective import Objective
from preftune.training.memory import (
    explain_lack_of_memory,
    num_positions_of,
    rows_and_tokens,
    training_remedies,
)
from preftune.training.step import TrainState


def try_heaviest(
    state: TrainState,
    rows: Sequence[int],
    batcher: RowBatcher,
    objective: Objective[Any],
    runtime: Runtime,
    *,
    num_micro_batches: int,
    accumulation: int,
) -> None:
    """Hold at once all that a step holds: optimizer state, gradients, activations of `rows`.

    Weights and generators are left as they are; the optimizer's state is made, at its zeros.

    Args:
        state: before its first step.
        rows: of the micro-batch that takes most memory on this rank; every rank calls this.
        batcher: of the training pairs.
        objective: of the run.
        runtime: the ranks.
        num_micro_batches: of a step; with several, the gradients of one are there while the next
            one runs.
        accumulation: `gradient_accumulation_steps` of the run, for what to set instead.

    Raises:
        ConfigError: memory does not suffice; names what to lower.
    """
    device = runtime.device
    # An empty share is laid out as the first row: a rank without work runs it as a dummy.
    held = list(rows) or [0]
    layout = batcher.lay_out(held).layout
    positions = num_positions_of(layout)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        explain_lack_of_memory(
            "tried before the first step",
            device,
            lambda: (
                f"the heaviest micro-batch of this run ({rows_and_tokens(len(held), positions)})"
            ),
            lambda: training_remedies(len(held), positions, accumulation),
        ),
    ):
        state.engine.make_state(with_gradients=num_micro_batches > 1)
        state.model.train()
        with state.engine.accumulate(is_last=True):
            output = objective(state.model, batcher(rows))
            state.engine.backward(output.loss_sum)
    state.engine.drop_gradients()
