"""The heaviest micro-batch of a run, tried before the first step.

A run whose longest pairs come late would otherwise fail after hours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from preftune.batching.batcher import RowBatcher
from preftune.distributed.runtime import Runtime
from preftune.errors import ConfigError
from preftune.objective import Objective
from preftune.training.step import TrainState


def try_heaviest(
    state: TrainState,
    rows: Sequence[int],
    batcher: RowBatcher,
    objective: Objective[Any],
    runtime: Runtime,
    *,
    accumulates: bool,
) -> None:
    """Hold at once all that a step holds: optimizer state, gradients, activations of `rows`.

    Weights and generators are left as they are; the optimizer's state is made, at its zeros.

    Args:
        state: before its first step.
        rows: of the micro-batch that takes most memory on this rank; every rank calls this.
        batcher: of the training pairs.
        objective: of the run.
        runtime: the ranks.
        accumulates: whether a step has several micro-batches, so that gradients of one are there
            while the next one runs.

    Raises:
        ConfigError: memory does not suffice; names what to lower.
    """
    device = runtime.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _make_gradients(state.model)
            runtime.optimizer_step(state.optimizer, skip=torch.ones((), device=device))
            if accumulates:
                _make_gradients(state.model)
            state.model.train()
            output = objective(state.model, batcher(rows))
            runtime.backward(output.loss_sum)
        except (RuntimeError, MemoryError) as error:
            if not _is_lack_of_memory(error):
                raise
            problem = _explain(rows, batcher, runtime, error)
        else:
            state.optimizer.zero_grad(set_to_none=True)
            return
    raise ConfigError(problem)


def _make_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(
        error
    )


def _explain(rows: Sequence[int], batcher: RowBatcher, runtime: Runtime, error: Exception) -> str:
    rows = list(rows) or [0]  # as the batcher does for a rank without work
    layout = batcher.lay_out(rows).layout
    positions = sum(block.input_ids.numel() for block in layout.blocks)
    what = f"{len(rows)} pairs" if len(rows) > 1 else f"the pair {batcher.examples[rows[0]].row_id}"
    remedies = ["--gradient_checkpointing true"]
    if len(rows) > 1:
        remedies.insert(
            0, f"--max_tokens_per_microbatch {positions // 2} (the steps stay the same)"
        )
    else:
        remedies.append(f"--max_length below {max(batcher.examples[rows[0]].lengths)}")
    return (
        f"the heaviest micro-batch of this run ({what}, {positions} tokens) does not fit into the "
        f"memory of {runtime.device}, tried before the first step: "
        f"{str(error).strip().splitlines()[0]}. Set {', or '.join(remedies)}"
    )
