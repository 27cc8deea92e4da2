"""How long and how fast to train."""

from dataclasses import dataclass
from typing import Annotated, Literal

from preftune.config.optimizers import fill_unset, optimizer_problems
from preftune.config.problem import Problem, below, count
from preftune.config.section import Section
from preftune.config.stage import StageChoice
from preftune.config.typed import AlsoSpelled

MixedPrecision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], AlsoSpelled(no="fp32")]
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_min_lr",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "wsd",
]
_WITHOUT_WARMUP = ("constant",)
_LEARNING_RATES = {"dpo": 5e-7, "sft": 2e-5}
OptimizerName = Annotated[
    Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_8bit",
        "adamw_torch_8bit",
        "adamw_torch_4bit",
        "adafactor",
        "muon",
        "sgd",
    ],
    AlsoSpelled(
        adamw_torch="adamw",
        adamw_torch_fused="adamw",
        adamw_bnb_8bit="adamw_8bit",
        adamw_torchao_8bit="adamw_torch_8bit",
        adamw_torchao_4bit="adamw_torch_4bit",
    ),
]


@dataclass(kw_only=True)
class TrainingConfig(StageChoice, Section):
    """Length, batch size, learning rate and optimizer."""

    num_epochs: float | None = None
    """Passes over the training pairs, above 0; may be a fraction. Unset: 1, unless
    `max_train_steps` is given."""

    max_train_steps: int | None = None
    """Optimizer steps, 1 or more, instead of `num_epochs`. Unset: as `num_epochs` says."""

    per_device_train_batch_size: int = 8
    """Pairs in one forward and backward on one device, 1 or more (but see
    `max_tokens_per_microbatch`)."""

    per_device_eval_batch_size: int | None = None
    """Most pairs in one evaluation forward on one device, 1 or more. Unset: as in training."""

    max_tokens_per_microbatch: int | None = None
    """Most tokens in one forward and backward on one device, 2 or more, padding included: what
    bounds memory where lengths differ. The pairs of a global batch stay the same and are packed
    into as many forwards as it takes; a longer pair goes alone. Evaluation is packed so, too.
    Unset: forwards hold `per_device_train_batch_size` pairs, whatever their length."""

    total_batch_size: int | None = None
    """Pairs of one optimizer step over all devices, 1 or more, instead of
    `gradient_accumulation_steps`: a run then makes the same steps on any number of devices, and may
    go on with more or fewer. Unset: as that says."""

    gradient_accumulation_steps: int = 1
    """Forwards and backwards before one optimizer step, 1 (off) or more. The global batch is
    this times `per_device_train_batch_size` times the number of devices (of groups of devices:
    `sequence_parallel_size`)."""

    learning_rate: float | None = None
    """Highest learning rate of the schedule, above 0. Unset: that of full fine-tuning, 5e-7 for
    stage dpo and 2e-5 for sft; adapters (`use_lora`) take about ten times as much."""

    lr_scheduler_type: Schedule = "linear"
    """How the learning rate changes after warm-up. wsd: warm-up, stable, decay."""

    warmup_ratio: float | None = None
    """Part of the steps over which the learning rate rises, 0 (off) to below 1. Unset: 0.1,
    unless `warmup_steps` is given or the schedule has no warm-up (constant)."""

    warmup_steps: int | None = None
    """Steps over which the learning rate rises, 0 (off) or more, instead of `warmup_ratio`."""

    optimizer: OptimizerName = "adamw"
    """The optimizer, by what it keeps for each parameter: adamw 8 bytes; adamw_8bit (bitsandbytes)
    and adamw_torch_8bit (torchao's, without a package) 2, adamw_torch_4bit 1, adafactor next to
    nothing; muon 4 for hidden matrices, and AdamW's 8 for the rest. paged_adamw_8bit: as
    adamw_8bit, in memory that a GPU's driver moves to the host when it is short. sgd keeps nothing:
    mainly for tests. docs/memory.md says which engine takes which."""

    weight_decay: float = 0.0
    """Decoupled weight decay a step, as a part of the learning rate; 0 (off) or more."""

    adam_beta1: float | None = None
    """AdamW's decay of the mean of gradients, 0 to below 1. Unset: 0.9."""

    adam_beta2: float | None = None
    """AdamW's decay of the mean of squared gradients, 0 to below 1. Unset: 0.999."""

    adam_epsilon: float | None = None
    """Added to AdamW's denominator, above 0. Unset: 1e-8."""

    muon_momentum: float | None = None
    """Muon's decay of the mean of gradients, 0 to below 1. Unset: 0.95."""

    stochastic_rounding: bool = False
    """Round updated bfloat16 weights up or down by chance, so that updates too small for them count
    on average. Needs `dtype` bfloat16 and an optimizer other than sgd and bitsandbytes'."""

    max_grad_norm: float | None = 1.0
    """Gradients longer than this (L2 over all parameters) are scaled to it; 0 or null is off."""

    mixed_precision: MixedPrecision = "auto"
    """How products are computed. auto: bf16 where the device has it in hardware; else fp16 on GPUs
    and fp32 on CPUs; "no" is another word for fp32. fp16 reaches to 65,504 only, so the loss is
    scaled before its backward and gradients are scaled back before `max_grad_norm`: by 65,536 at
    first, twice as much after 2,000 good steps, half as much where a gradient overflows. Such a
    step is left out. Weights stay float32 (`dtype`)."""

    shuffle: bool = True
    """Take the pairs in a new random order each epoch. false: in the order of the dataset."""

    def __post_init__(self) -> None:
        """Fill learning rate, length, warm-up and the optimizer's numbers where unset."""
        if self.learning_rate is None:
            self.learning_rate = _LEARNING_RATES[self.stage]
        if self.num_epochs is None and self.max_train_steps is None:
            self.num_epochs = 1.0
        no_warmup_given = self.warmup_ratio is None and self.warmup_steps is None
        if no_warmup_given and self.lr_scheduler_type not in _WITHOUT_WARMUP:
            self.warmup_ratio = 0.1
        fill_unset(self)
        self.max_grad_norm = self.max_grad_norm or None  # one form of "off"

    @property
    def peak_rate(self) -> float:
        """The learning rate, which is never unset in a configuration that exists."""
        assert self.learning_rate is not None
        return self.learning_rate

    @property
    def eval_rows(self) -> int | None:
        """Most pairs in one evaluation forward on one device; None where tokens alone bound it."""
        if self.per_device_eval_batch_size is None and self.max_tokens_per_microbatch is not None:
            return None
        return self.per_device_eval_batch_size or self.per_device_train_batch_size

    def global_batch_size(self, shares: int) -> int:
        """Pairs of one optimizer step.

        Args:
            shares: devices, or groups of devices that share each row.
        """
        if self.total_batch_size is not None:
            return self.total_batch_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * shares

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        return [
            *_length_problems(self),
            *_warmup_problems(self),
            *_rate_problems(self),
            *optimizer_problems(self),
            *count("per_device_train_batch_size", self.per_device_train_batch_size),
            *count("per_device_eval_batch_size", self.per_device_eval_batch_size),
            *count("max_tokens_per_microbatch", self.max_tokens_per_microbatch, least=2),
            *count("gradient_accumulation_steps", self.gradient_accumulation_steps),
            *_batch_problems(self),
        ]


def precision_problems(dtype: str, mixed_precision: str) -> list[Problem]:
    """Of weights and products that do not go together.

    Args:
        dtype: of the weights.
        mixed_precision: how products are computed.
    """
    if mixed_precision != "fp16" or dtype == "float32":
        return []
    message = f"the weights are {dtype}, and fp16 needs float32 ones: set dtype to float32, or "
    message += "this to bf16"
    return [Problem("mixed_precision", mixed_precision, message, ("dtype",))]


def _both(key: str, value: float, other: str) -> Problem:
    message = f"{other} is given too, and they exclude each other: leave one out or set it to null"
    return Problem(key, value, message, (other,))


def _length_problems(section: TrainingConfig) -> list[Problem]:
    found = count("max_train_steps", section.max_train_steps)
    if section.num_epochs is not None and section.num_epochs <= 0:
        found.append(Problem("num_epochs", section.num_epochs, "it must be above 0"))
    if section.num_epochs is not None and section.max_train_steps is not None:
        found.append(_both("num_epochs", section.num_epochs, "max_train_steps"))
    return found


def _batch_problems(section: TrainingConfig) -> list[Problem]:
    total, steps = section.total_batch_size, section.gradient_accumulation_steps
    found = count("total_batch_size", total)
    if total is not None and steps != 1:
        found.append(_both("total_batch_size", total, "gradient_accumulation_steps"))
    return found


def _warmup_problems(section: TrainingConfig) -> list[Problem]:
    found = count("warmup_steps", section.warmup_steps, least=0)
    if section.warmup_ratio is not None and not 0 <= section.warmup_ratio < 1:
        message = "it must be 0 or more and below 1"
        found.append(Problem("warmup_ratio", section.warmup_ratio, message))
    if section.lr_scheduler_type in _WITHOUT_WARMUP:
        message = (
            f"the schedule {section.lr_scheduler_type} has no warm-up: leave it out, "
            "or take constant_with_warmup"
        )
        for key in ("warmup_ratio", "warmup_steps"):
            if (value := getattr(section, key)) is not None:
                found.append(Problem(key, value, message, ("lr_scheduler_type",)))
    elif section.warmup_ratio is not None and section.warmup_steps is not None:
        found.append(_both("warmup_ratio", section.warmup_ratio, "warmup_steps"))
    return found


def _rate_problems(section: TrainingConfig) -> list[Problem]:
    found = below("weight_decay", section.weight_decay, 0, "it must be 0 (off) or more")
    found += below("max_grad_norm", section.max_grad_norm, 0, "it must be above 0, or 0 for off")
    if section.peak_rate <= 0:
        found.append(Problem("learning_rate", section.learning_rate, "it must be above 0"))
    return found
