"""What each optimizer reads, and where it runs."""

from typing import Any

from preftune.config.problem import Problem, listed

ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
MUON = {"muon_momentum": 0.95}
READS: dict[str, dict[str, float]] = {
    "adamw": ADAM,
    "adamw_8bit": ADAM,
    "paged_adamw_8bit": ADAM,
    "adamw_torch_8bit": ADAM,
    "adamw_torch_4bit": ADAM,
    "adafactor": {},
    "muon": ADAM | MUON,
    "sgd": {},
}
"""Optimizer -> the options that it alone, or with some others, reads, and their defaults."""
ROUNDS = ("adamw", "adamw_torch_8bit", "adamw_torch_4bit", "adafactor", "muon")
"""Those that can round by chance."""
OF_BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit")
"""Those of the package bitsandbytes; the second needs a GPU."""
ON_FSDP = ("adamw", "adamw_torch_8bit", "adamw_torch_4bit")
"""Those whose update of a row needs nothing of other rows, and that know of weights cut by rows."""
ON_ZERO = ("adamw", "sgd")
"""Those that update a stretch of numbers without knowing the weights that they are of."""


def fill_unset(section: Any) -> None:
    """Give the options that the optimizer reads their defaults.

    Args:
        section: a `TrainingConfig`; changed in place.
    """
    for key, default in READS.get(section.optimizer, {}).items():
        if getattr(section, key) is None:
            setattr(section, key, default)


def optimizer_problems(section: Any) -> list[Problem]:
    """Numbers that are out of range, or that the optimizer does not read.

    Args:
        section: a `TrainingConfig`.
    """
    found = []
    for key in (*ADAM, *MUON):
        value = getattr(section, key)
        if value is None:
            continue
        readers = [name for name, keys in READS.items() if key in keys]
        if section.optimizer not in readers:
            message = f"the optimizer {section.optimizer} does not read it, only {listed(readers)}"
            found.append(Problem(key, value, message, ("optimizer",)))
        elif key == "adam_epsilon" and value <= 0:
            found.append(Problem(key, value, "it must be above 0"))
        elif key != "adam_epsilon" and not 0 <= value < 1:
            found.append(Problem(key, value, "it must be 0 or more and below 1"))
    if section.stochastic_rounding and section.optimizer not in ROUNDS:
        message = f"the optimizer {section.optimizer} rounds to the nearest number: leave it out, "
        message += f"or take {listed(ROUNDS)}"
        found.append(Problem("stochastic_rounding", True, message, ("optimizer",)))
    return found


def placement_problems(config: Any) -> list[Problem]:
    """Of an optimizer that the engine, the weights or the adapter cannot have.

    Args:
        config: an `ExperimentConfig`.
    """
    found, name = [], config.optimizer
    if config.fsdp != "no" and name not in ON_FSDP:
        message = (
            f"fsdp is {config.fsdp!r}, and it cannot update weights that are cut over devices: "
            f"take {listed(ON_FSDP)}, or leave fsdp out"
        )
        found.append(Problem("optimizer", name, message, ("fsdp",)))
    if config.zero_stage is not None and name not in ON_ZERO:
        message = (
            f"zero_stage is {config.zero_stage}, and DeepSpeed updates stretches of numbers across "
            f"weights: take {listed(ON_ZERO)}, or leave zero_stage out"
        )
        found.append(Problem("optimizer", name, message, ("zero_stage",)))
    if config.use_lora and name == "muon":
        message = "use_lora is true, and muon is for whole matrices, not for their factors: take "
        message += "adamw"
        found.append(Problem("optimizer", name, message, ("use_lora",)))
    return found + _rounding_problems(config)


def _rounding_problems(config: Any) -> list[Problem]:
    if not config.stochastic_rounding:
        return []
    reasons = {
        "dtype": config.dtype != "bfloat16"
        and f"the weights are {config.dtype}, which loses no update: set dtype to bfloat16, or "
        "leave it out",
        "use_lora": config.use_lora
        and "use_lora is true, and an adapter's weights are float32: leave it out",
        "zero_stage": config.zero_stage is not None
        and "DeepSpeed updates float32 copies of the weights: leave it out, or zero_stage",
    }
    return [
        Problem("stochastic_rounding", True, message, (key,))
        for key, message in reasons.items()
        if message
    ]
