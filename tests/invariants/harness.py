"""A short training on random pairs through the real step, sampler, batcher and optimizer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import MicroBatching, RowSizes
from preftune.batching.sampler import PairSampler
from preftune.config.distributed import DistributedConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.runtime import Precision, Runtime
from preftune.losses import DPOLossType, make_loss
from preftune.model.forward import PolicyModel
from preftune.objective import PairObjective
from preftune.reference.build import reference_logps
from preftune.reference.store import ReferenceStore
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step
from tests.examples import make_examples
from tests.tiny import tiny_model


@dataclass
class Trace:
    """What a short training did."""

    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""
    weights: torch.Tensor
    moved: float
    """Largest change of a weight."""
    scales: list[float] = field(default_factory=list)
    """Of the loss, after each step; empty but for fp16."""


def short_training(
    cache: Path,
    *,
    micro_batch: int,
    accumulation: int,
    optimizer: str,
    learning_rate: float,
    loss_type: str = "dpo",
    num_pairs: int = 21,
    num_epochs: int = 2,
    perturbation: float = 0.05,
    make_objective: Callable[..., PairObjective] = PairObjective,
    make_runtime: Callable[..., Runtime] = Runtime,
    make_model: Callable[[], Any] = tiny_model,
    engines: DistributedConfig | None = None,
    precision: Precision = "fp32",
    max_grad_norm: float | None = None,
    adam_epsilon: float | None = None,
    weights: Mapping[int, float] | None = None,
) -> Trace:
    """Train a tiny Llama from a perturbed policy and record every step.

    The reference is the unperturbed model, so the loss is not at its constant and its gradient not
    at its symmetric point, where many mistakes cancel. Steps that are left out have no loss: inf.
    `weights` of rows are 1 where not given.
    """
    runtime = make_runtime(precision, 0)
    examples = make_examples(num_pairs, seed=5)
    policy = PolicyModel(make_model())
    reference = reference_logps(
        policy,
        examples,
        ReferenceStore(cache, "harness", {}),
        layout=Layout("concatenated"),
        device=runtime.device,
    ).sums
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += perturbation * torch.randn(parameter.shape, generator=generator)
    start = _flat(policy)
    config = TrainingConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        adam_epsilon=adam_epsilon,
    )
    engine = runtime.spread(
        policy,
        partial(make_optimizer, config=config),
        engines or DistributedConfig(),
        max_grad_norm=max_grad_norm,
    )
    state = TrainState.at_start(engine, runtime.device, precision=precision)
    columns = {}
    if weights is not None:
        of_row = [weights.get(row, 1.0) for row in range(num_pairs)]
        columns["weight"] = torch.tensor(of_row, dtype=torch.float64, device=runtime.device)
    batcher = RowBatcher(examples, reference, Layout("concatenated"), runtime.device, columns)
    objective = make_objective(make_loss(DPOLossType(loss_type)))
    rank, ranks = runtime.rank, runtime.world_size
    sampler = PairSampler(num_pairs, micro_batch * accumulation * ranks, seed=3)
    batching = MicroBatching(RowSizes.of(examples), "concatenated", micro_batch)
    trace = Trace([], [], start, 0.0)
    for step in range(num_epochs * sampler.steps_per_epoch):
        batch = sampler.batch(step)
        shares = batching.split(batch, rank, ranks)
        train_step(
            state,
            [batcher(share, batch) for share in shares],
            objective,
            runtime,
            num_rows=len(batch),
            learning_rate=learning_rate,
        )
        means = state.window.means(runtime.all_reduce)
        state.window.clear()
        trace.losses.append(means.get("loss", math.inf))
        trace.grad_norms.append(means.get("grad_norm", math.inf))
        if state.loss_scale is not None:
            trace.scales.append(float(state.loss_scale.value))
    trace.weights = torch.cat([engine.whole(p).flatten() for p in policy.parameters()])
    trace.moved = float((trace.weights - start).abs().max())
    return trace


def _flat(policy: PolicyModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
