"""The configuration of `preftune score`."""

from dataclasses import dataclass

from preftune.config.composed import ComposedConfig
from preftune.config.dataset import PairsConfig
from preftune.config.dpo import ForwardLayout, layout_problems
from preftune.config.logging import Progress
from preftune.config.model import ModelConfig, gguf_problems
from preftune.config.problem import Problem, count
from preftune.config.section import Section
from preftune.config.training import MixedPrecision, precision_problems

DEFAULT_BETA = 0.1
"""Scale of implicit rewards where none is given: that of the dpo loss."""


@dataclass(kw_only=True)
class ScoringConfig(Section):
    """What to compute, and where to write it."""

    reference_model_name_or_path: str | None = None
    """The model that implicit rewards are measured against. Unset: no implicit rewards, only
    how often the chosen answer is the likelier one."""

    beta: float | None = None
    """Scale of the implicit rewards, above 0; only with a reference model. Unset: 0.1."""

    kl_samples: int | None = None
    """Sample this many answers from the model, at temperature 1, to prompts of the data, and
    estimate from them how far it is from the reference: the KL divergence in nats an answer, 2
    samples or more. Unset: no estimate."""

    kl_max_new_tokens: int | None = None
    """Most tokens of a sampled answer, 1 or more; the estimate is that of answers cut there.
    Unset: 256."""

    per_device_eval_batch_size: int | None = None
    """Most pairs in one forward on one device, 1 or more. Unset: 8, or any number where
    `max_tokens_per_microbatch` is given."""

    max_tokens_per_microbatch: int | None = None
    """Most tokens in one forward on one device, 2 or more, padding included; a longer pair goes
    alone. Unset: only the number of pairs bounds a forward."""

    mixed_precision: MixedPrecision = "auto"
    """How products are computed. auto: bf16 where the device has it in hardware; else fp16 on GPUs
    and fp32 on CPUs; "no" is another word for fp32."""

    forward_layout: ForwardLayout = "auto"
    """How pairs go through the model. shared_prefix: one packed row without padding, each prompt
    once; concatenated: chosen and rejected as padded rows of one forward; separate: one side after
    the other, less memory. auto: shared_prefix where the model follows it, else concatenated."""

    output: str | None = None
    """A .parquet file for the scores of every pair. Unset: only the summary."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live bar; plain: lines; none: nothing; auto: rich in a
    terminal, else plain."""

    def __post_init__(self) -> None:
        """Fill beta where rewards are computed, and the batch size where nothing bounds it."""
        if self.per_device_eval_batch_size is None and self.max_tokens_per_microbatch is None:
            self.per_device_eval_batch_size = 8
        if self.beta is None and self.reference_model_name_or_path is not None:
            self.beta = DEFAULT_BETA
        if self.kl_max_new_tokens is None and self.kl_samples is not None:
            self.kl_max_new_tokens = 256

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("per_device_eval_batch_size", self.per_device_eval_batch_size)
        found += count("max_tokens_per_microbatch", self.max_tokens_per_microbatch, least=2)
        if self.beta is not None and self.reference_model_name_or_path is None:
            message = "without reference_model_name_or_path there are no rewards to scale"
            found.append(Problem("beta", self.beta, message, ("reference_model_name_or_path",)))
        elif self.beta is not None and self.beta <= 0:
            found.append(Problem("beta", self.beta, "it must be above 0"))
        found += count("kl_samples", self.kl_samples, least=2)
        found += count("kl_max_new_tokens", self.kl_max_new_tokens)
        if self.kl_samples is not None and self.reference_model_name_or_path is None:
            message = "without reference_model_name_or_path there is nothing to be far from"
            others = ("reference_model_name_or_path",)
            found.append(Problem("kl_samples", self.kl_samples, message, others))
        if self.kl_max_new_tokens is not None and self.kl_samples is None:
            message = "without kl_samples nothing is sampled"
            found.append(
                Problem("kl_max_new_tokens", self.kl_max_new_tokens, message, ("kl_samples",))
            )
        if self.output is not None and not self.output.endswith(".parquet"):
            found.append(Problem("output", self.output, "it must be the path of a .parquet file"))
        return found


@dataclass(kw_only=True)
class ScoreConfig(ComposedConfig, ScoringConfig, ModelConfig, PairsConfig):
    """Everything scoring needs, flat."""

    def cross_problems(self) -> list[Problem]:
        """Settings that contradict each other, or that only training reads."""
        message = "scoring trains nothing, so it has no effect: leave it out"
        found = layout_problems(self.forward_layout, self.attn_implementation)
        found += precision_problems(self.dtype, self.mixed_precision)
        key, name = "reference_model_name_or_path", self.reference_model_name_or_path
        found += gguf_problems(self, key, name)
        if self.gradient_checkpointing:
            found.append(Problem("gradient_checkpointing", True, message))
        if not self.disable_dropout:
            found.append(Problem("disable_dropout", False, message))
        return found
