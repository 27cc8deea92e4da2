"""One optimizer step, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from preftune.distributed.runtime import Runtime
from preftune.metrics import MetricSums
from preftune.objective import MicroBatch, PreferenceObjective


@dataclass
class TrainState:
    """What changes while training; a checkpoint holds all of it."""

    model: nn.Module
    """The policy, wrapped by the engine."""
    optimizer: Any
    step: int
    """Optimizer steps done."""
    num_tokens: Tensor
    """Device scalar, fp64: tokens forwarded in training by all ranks so far, padding left out."""
    bad_step: Tensor
    """Device scalar: the first step, counted from 1, whose loss or gradient was not finite; 0 while
    there is none. From then on no update is applied, so the weights stay those from before it."""
    window: MetricSums
    """Metrics since the last logging step."""

    @classmethod
    def at_start(cls, model: nn.Module, optimizer: Any, device: torch.device) -> "TrainState":
        """Before the first step."""
        num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        bad_step = torch.zeros((), dtype=torch.int64, device=device)
        return cls(model, optimizer, 0, num_tokens, bad_step, MetricSums())


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    objective: PreferenceObjective,
    runtime: Runtime,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
) -> None:
    """Train on one global batch.

    The gradient is that of sum(loss) / count over the pairs of all micro-batches of all ranks, so
    it does not depend on how the batch was dealt. Nothing here makes the host wait for the device.

    Args:
        state: changed in place.
        micro_batches: this rank's share; every rank brings equally many.
        objective: gives sums and counts.
        runtime: the ranks.
        learning_rate: of this step.
        max_grad_norm: clip the global L2 norm to this; None or 0 is off.
    """
    on_device: dict[str, Any] = {"dtype": torch.float64, "device": runtime.device}
    # Counted first, over every rank, because each backward below needs it.
    num_pairs = sum(mb.num_pairs for mb in micro_batches)
    num_tokens = sum(mb.layout.num_tokens for mb in micro_batches if mb.num_pairs)
    counts = torch.stack([torch.full((), n, **on_device) for n in (num_pairs, num_tokens)])
    global_pairs, global_tokens = runtime.all_reduce(counts)

    # ---------------------------------------------------------------- forward and backward
    state.model.train()
    loss_sum = torch.zeros((), **on_device)
    for number, micro_batch in enumerate(micro_batches, start=1):
        with runtime.accumulate(state.model, is_last=number == len(micro_batches)):
            output = objective(state.model, micro_batch)
            # Engines average gradients over ranks: world_size turns the average into the sum.
            runtime.backward(output.loss_sum * (runtime.world_size / global_pairs))
        loss_sum += output.sums["loss"]
        for name, total in output.sums.items():
            state.window.add(name, total, output.count)

    # ---------------------------------------------------------------- update
    grad_norm = runtime.clip_gradients(state.model, max_grad_norm)
    finite = torch.isfinite(grad_norm) & torch.isfinite(runtime.all_reduce(loss_sum))
    this_step = torch.full_like(state.bad_step, state.step + 1)
    healthy = state.bad_step == 0
    state.bad_step = torch.where(healthy & ~finite, this_step, state.bad_step)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    runtime.optimizer_step(state.optimizer, skip=(state.bad_step > 0).float())

    state.window.add("grad_norm", grad_norm, 1)
    state.window.add("learning_rate", learning_rate, 1)
    state.step += 1
    state.num_tokens = state.num_tokens + global_tokens
