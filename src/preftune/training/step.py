"""One optimizer step, on one page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from preftune.batching.batcher import MicroBatch
from preftune.distributed.engine import Engine
from preftune.distributed.runtime import Precision, Runtime
from preftune.metrics import MetricSums
from preftune.objective import GlobalBatch, Objective, gathered
from preftune.reference.live import LiveReference
from preftune.training.guards import Guards
from preftune.training.loss_scale import LossScale


@dataclass
class TrainState:
    """What changes while training; a checkpoint holds all of it."""

    engine: Engine
    """Holds the policy and its optimizer."""
    step: int
    """Optimizer steps done."""
    num_tokens: Tensor
    """Device scalar, fp64: tokens forwarded in training by all ranks so far, padding left out."""
    bad_step: Tensor
    """Device scalar: the step, counted from 1, whose loss or gradient was not finite when no more
    batch may be skipped for that; 0 while there is none. From then on no update is applied, so the
    weights stay those from before it."""
    num_skipped: Tensor
    """Device scalar: batches so far whose update was left out, because it was not finite."""
    window: MetricSums
    """Metrics since the last logging step."""
    running: Tensor | None = None
    """On the device, fp64: the few numbers that the loss keeps from one global batch to the next;
    None for losses that keep nothing, and before the first step."""
    reference: LiveReference | None = None
    """The reference that follows the policy; None for one that stays."""
    loss_scale: LossScale | None = None
    """Of fp16 products; None for others."""
    guards: Guards = field(default_factory=Guards)
    """On the host: what was read of all this so far."""

    @classmethod
    def at_start(
        cls,
        engine: Engine,
        device: torch.device,
        reference: LiveReference | None = None,
        precision: Precision = "fp32",
    ) -> "TrainState":
        """Before the first step."""
        num_tokens = torch.zeros((), dtype=torch.float64, device=device)
        bad_step = torch.zeros((), dtype=torch.int64, device=device)
        return cls(
            engine=engine,
            step=0,
            num_tokens=num_tokens,
            bad_step=bad_step,
            num_skipped=torch.zeros_like(bad_step),
            window=MetricSums(),
            reference=reference,
            loss_scale=LossScale(device) if precision == "fp16" else None,
        )

    @property
    def model(self) -> nn.Module:
        """The policy, wrapped by the engine."""
        return self.engine.model

    def judge(self, loss: Tensor, grad_norm: Tensor, max_skipped: int) -> Tensor:
        """Count a step that is not finite; on the device, whether its update is left out.

        A gradient that overflows under a loss scale which can fall is the scale's fault: the step
        is left out, and not counted. A loss has no scale.

        Args:
            loss: of the step, of all ranks.
            grad_norm: the same, of its gradient.
            max_skipped: how many steps may be left out; the next one is the last.
        """
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        overflowed = torch.zeros_like(finite)
        if self.loss_scale is not None:
            overflowed = torch.isfinite(loss) & ~finite & self.loss_scale.can_fall
        bad = ~finite & ~overflowed
        num_skipped = self.num_skipped + bad
        is_last = (self.bad_step == 0) & (num_skipped > max_skipped) & bad
        this_step = torch.full_like(self.bad_step, self.step + 1)
        self.bad_step = torch.where(is_last, this_step, self.bad_step)
        stopped = self.bad_step > 0
        self.num_skipped = torch.where(stopped, self.num_skipped, num_skipped)
        if self.loss_scale is not None:
            self.loss_scale.follow(good=finite & ~stopped, overflowed=overflowed & ~stopped)
        return stopped | ~finite


def train_step(
    state: TrainState,
    micro_batches: Sequence[MicroBatch],
    objective: Objective[Any],
    runtime: Runtime,
    *,
    num_rows: int,
    learning_rate: float,
    num_terms: int | None = None,
    max_skipped: int = 0,
) -> None:
    """Train on one global batch.

    The gradient is that of sum(loss) / count over the rows of all micro-batches of all ranks, so
    it does not depend on how the batch was dealt. Nothing here makes the host wait for the device.

    Args:
        state: changed in place.
        micro_batches: this rank's share; every rank brings equally many.
        objective: gives sums and counts.
        runtime: the ranks.
        num_rows: rows of the global batch, all ranks' together.
        learning_rate: of this step.
        num_terms: what the sum is divided by, all ranks' together: the tokens of the answers where
            the loss is a mean over those. None: the rows.
        max_skipped: batches of the run that are left out if their loss or gradient is not finite.
            A batch that is left out changes nothing but the counters.
    """
    engine, scale = state.engine, state.loss_scale
    num_terms = num_terms or num_rows
    # By `world_size`, see below: what fp16 holds of a row's gradient is the same on any number.
    engine.loss_scale = None if scale is None else scale.value / runtime.world_size
    engine.model.train()
    batches = _global_batches(engine.model, micro_batches, objective, runtime, num_rows)

    # ---------------------------------------------------------------- forward and backward
    loss_sum = torch.zeros((), dtype=torch.float64, device=runtime.device)
    running, metrics = None, MetricSums()
    for number, (micro_batch, batch) in enumerate(zip(micro_batches, batches, strict=True), 1):
        with engine.accumulate(is_last=number == len(micro_batches)):
            output = objective(engine.model, micro_batch, batch=batch, running=state.running)
            # Engines average gradients over ranks: world_size turns the average into the sum.
            engine.backward(output.loss_sum * (runtime.world_size / num_terms))
        loss_sum += output.metrics["loss"].total
        running = output.running
        for name, metric in output.metrics.items():
            metrics.add(name, metric.total, metric.count)

    # ---------------------------------------------------------------- update
    num_tokens = sum(mb.layout.num_tokens for mb in micro_batches if mb.num_rows)
    totals = torch.stack([loss_sum, torch.full_like(loss_sum, num_tokens)])
    global_loss, global_tokens = runtime.sum_shares(totals)
    grad_norm = engine.clip_gradients()
    skip = state.judge(global_loss, grad_norm, max_skipped)
    engine.set_learning_rate(learning_rate)
    engine.update(skip=skip.float())
    if running is not None:
        before = torch.zeros_like(running) if state.running is None else state.running
        state.running = torch.where(skip, before, running)

    metrics.add("grad_norm", grad_norm, 1)
    # Where nothing may be skipped, the run stops before it logs a bad step.
    may_skip = max_skipped or scale is not None
    state.window.add_all(metrics, keep=~skip if may_skip else None)
    state.window.add("learning_rate", learning_rate, 1)
    state.step += 1
    state.num_tokens = state.num_tokens + global_tokens
    if state.reference is not None:
        state.reference.follow(state.step, ~skip)


def _global_batches(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    objective: Objective[Any],
    runtime: Runtime,
    num_rows: int,
) -> list[GlobalBatch[Any] | None]:
    """For each micro-batch the log-probs of all, for a loss that compares rows with each other.

    A pass without gradient comes first; the gradient of such a loss then is right one micro-batch
    at a time. Each None where a micro-batch is all there is to see.
    """
    alone = len(micro_batches) == runtime.data_size == 1 and micro_batches[0].trained is None
    if alone or not objective.loss.needs_global_batch:
        return [None] * len(micro_batches)
    with torch.no_grad():
        parts = [objective.rows(model, micro_batch) for micro_batch in micro_batches]
    slots = [mb.slots for mb in micro_batches if mb.slots is not None]
    assert len(slots) == len(micro_batches)  # laid out with their global batch
    whole = gathered(parts, torch.cat(slots), num_rows, runtime.sum_shares)
    return [GlobalBatch(whole, own) for own in slots]
