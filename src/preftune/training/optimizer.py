"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable
from typing import Any, Literal, assert_never

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from preftune.config.training import TrainingConfig
from preftune.training.optimizers.adafactor import Adafactor
from preftune.training.optimizers.adamw import BlockwiseAdamW
from preftune.training.optimizers.muon import Muon, hidden_matrices
from preftune.training.optimizers.paged import adamw_8bit
from preftune.training.optimizers.rounding import StochasticRounding

Schedule = Callable[[int], float]
"""Step, counted from 0, -> learning rate of that step."""

# Options of transformers' schedules that have no field yet.
_SCHEDULE_OPTIONS = {
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"lr_end": 0.0},
}
_BITS: dict[str, Literal[4, 8, 32]] = {
    "adamw": 32,
    "adamw_torch_8bit": 8,
    "adamw_torch_4bit": 4,
}
_DECAY_SHARE = 0.1
"""wsd: the last tenth of the run decays to 0, after warm-up and a constant stretch."""


def make_optimizer(model: nn.Module, config: TrainingConfig, seed: int = 0) -> Optimizer:
    """The optimizer of the trainable parameters, by its name.

    Weight decay leaves out one-dimensional parameters (biases and norms). Each can leave an update
    out by a flag of the device (`Engine.update`): PyTorch's fused kernels, and those of
    `training.optimizers`; bitsandbytes' alone wait for it.

    Args:
        model: whose parameters; before an engine cuts it, or after.
        config: which optimizer, and its numbers.
        seed: of stochastic rounding.
    """
    rate = config.peak_rate
    rounding = StochasticRounding(seed) if config.stochastic_rounding else None
    groups = _groups(model, config)
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, fused=True)
        case "adafactor":
            return Adafactor(groups, rate, rounding)
        case "muon":
            return Muon(groups, rate, rounding)
        case "adamw_8bit" | "paged_adamw_8bit":
            options, paged = _adam_options(config), config.optimizer.startswith("paged")
            return adamw_8bit(groups, rate, **options, paged=paged)
        case "adamw" if rounding is None:
            return torch.optim.AdamW(groups, lr=rate, **_adam_options(config), fused=True)
        case "adamw" | "adamw_torch_8bit" | "adamw_torch_4bit":
            bits = _BITS[config.optimizer]
            return BlockwiseAdamW(groups, rate, bits=bits, rounding=rounding)
    assert_never(config.optimizer)


def _groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, Any]]:
    """Trainable parameters by what they are updated with; no group is empty."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    shared = {} if config.adam_beta1 is None else _adam_options(config)
    muons: set[nn.Parameter] = set()
    if config.optimizer == "muon":
        muons = hidden_matrices(model)
    decayed = {"weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1 and p not in muons], **decayed, **shared},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, **shared},
    ]
    if muons:
        held = [p for p in trainable if p in muons]
        groups.append({"params": held, "momentum": config.muon_momentum, **decayed})
    return [group for group in groups if group["params"]]


def _adam_options(config: TrainingConfig) -> dict[str, Any]:
    """AdamW's numbers, which the config has filled for what reads them."""
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def make_schedule(config: TrainingConfig, num_steps: int) -> Schedule:
    """The learning rate as a pure function of the step, so that a resume has nothing to restore.

    The shapes are transformers' own; `wsd` is its `warmup_stable_decay`.

    Args:
        config: `lr_scheduler_type`, warm-up and peak rate.
        num_steps: optimizer steps of the whole run.
    """
    from transformers import get_scheduler  # which brings PEFT and all that it finds installed

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
