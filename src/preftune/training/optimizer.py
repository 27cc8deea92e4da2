"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from preftune.config.training import TrainingConfig

Schedule = Callable[[int], float]
"""Step, counted from 0, -> learning rate of that step."""

# Options of transformers' schedules that have no field yet.
_SCHEDULE_OPTIONS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"lr_end": 0.0},
}
_DECAY_SHARE = 0.1
"""wsd: the last tenth of the run decays to 0, after warm-up and a constant stretch."""


def make_optimizer(model: nn.Module, config: TrainingConfig) -> Optimizer:
    """AdamW or SGD over the trainable parameters.

    Weight decay leaves out one-dimensional parameters (biases and norms). The fused kernels are
    used because they can skip an update on the device (`Engine.update`).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_rate, fused=True)
    assert config.adam_beta1 is not None  # filled by the config for adamw
    assert config.adam_beta2 is not None
    assert config.adam_epsilon is not None
    return torch.optim.AdamW(
        groups,
        lr=config.peak_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def make_schedule(config: TrainingConfig, num_steps: int) -> Schedule:
    """The learning rate as a pure function of the step, so that a resume has nothing to restore.

    The shapes are transformers' own; `wsd` is its `warmup_stable_decay`.

    Args:
        config: `lr_scheduler_type`, warm-up and peak rate.
        num_steps: optimizer steps of the whole run.
    """
    num_warmup = warmup_steps(config, num_steps)
    name = config.lr_scheduler_type
    options = dict(_SCHEDULE_OPTIONS.get(name, {}))
    if name == "wsd":
        name = "warmup_stable_decay"
        options["num_decay_steps"] = max(1, round(num_steps * _DECAY_SHARE))
    parameter = nn.Parameter(torch.zeros(()))
    throwaway = torch.optim.SGD([parameter], lr=config.peak_rate)
    scheduler = get_scheduler(name, throwaway, num_warmup, num_steps, options)
    assert isinstance(scheduler, LambdaLR)  # all of the names above make one
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.peak_rate * float(factor(step))


def warmup_steps(config: TrainingConfig, num_steps: int) -> int:
    """Steps of linear warm-up: given, or a share of the run rounded up, but never the whole run."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return min(num_steps - 1, math.ceil(num_steps * (config.warmup_ratio or 0.0) - 1e-9))
