"""When to evaluate on held-out pairs, and to look at answers."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section

EvalStrategy = Literal["never", "steps", "epoch"]


@dataclass(kw_only=True)
class EvalConfig(Section):
    """Evaluation during training."""

    eval_strategy: EvalStrategy | None = None
    """When to evaluate. Unset: steps if `eval_steps` is given, epoch if there are pairs for
    evaluation, else never."""

    eval_steps: int | float | None = None
    """Optimizer steps between two evaluations (1 or more), or a part of the run (between 0
    and 1). Unset: no evaluation by steps."""

    eval_on_start: bool = False
    """Also evaluate before the first step, to have something to compare with. It is never the best
    evaluation (`metric_for_best_model`)."""

    eval_kl_samples: int | None = None
    """Answers that are drawn from the policy before its first step, for each set of held-out pairs,
    2 or more: each evaluation then estimates how far the policy has moved from there, as kl/forward
    (docs/evaluation.md). Unset: none."""

    sample_steps: int | float | None = None
    """Optimizer steps after which the policy answers a few fixed prompts (1 or more), or a part of
    the run (between 0 and 1); after the last step, too. The answers go to samples.jsonl in the
    run's folder, beside those from before the first step. Unset: no samples."""

    num_samples: int | None = None
    """Prompts that are answered, 1 or more: of the held-out rows, or where there are none of those
    that are trained on. Unset: 8 with `sample_steps`."""

    sample_max_new_tokens: int | None = None
    """Longest answer that is generated, 1 or more tokens. Unset: 128 with `sample_steps` or
    `eval_kl_samples`."""

    def __post_init__(self) -> None:
        """Fill what samples need."""
        if self.sample_steps is not None and self.num_samples is None:
            self.num_samples = 8
        if self.generates and self.sample_max_new_tokens is None:
            self.sample_max_new_tokens = 128

    @property
    def generates(self) -> bool:
        """Whether the policy answers prompts."""
        return self.sample_steps is not None or self.eval_kl_samples is not None

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = [
            *_interval_problems("eval_steps", self.eval_steps),
            *_interval_problems("sample_steps", self.sample_steps),
            *count("eval_kl_samples", self.eval_kl_samples, least=2),
            *count("num_samples", self.num_samples),
            *count("sample_max_new_tokens", self.sample_max_new_tokens),
        ]
        if self.num_samples is not None and self.sample_steps is None:
            message = "there are no samples: give sample_steps, or leave it out"
            found.append(Problem("num_samples", self.num_samples, message, ("sample_steps",)))
        if self.sample_max_new_tokens is not None and not self.generates:
            message = "nothing is generated: give sample_steps or eval_kl_samples, or leave it out"
            key, others = "sample_max_new_tokens", ("sample_steps", "eval_kl_samples")
            found.append(Problem(key, self.sample_max_new_tokens, message, others))
        return found + _strategy_problems(self)


def steps_between(every: int | float, num_steps: int) -> int:
    """What a number of steps, or a part of the run, is in steps."""
    return max(1, round(every * num_steps)) if isinstance(every, float) else every


def _interval_problems(key: str, steps: int | float | None) -> list[Problem]:
    in_range = 0 < steps < 1 if isinstance(steps, float) else steps is None or steps >= 1
    if in_range:
        return []
    message = "it must be a number of steps (1 or more) or a part between 0 and 1"
    if isinstance(steps, float) and steps >= 1:
        message = (
            "with a decimal point it is a part of the run, which must be below 1; a "
            "number of steps is a whole number (1 is every step)"
        )
    return [Problem(key, steps, message)]


def _strategy_problems(section: EvalConfig) -> list[Problem]:
    steps, strategy = section.eval_steps, section.eval_strategy
    if strategy == "steps" and steps is None:
        return [Problem("eval_strategy", "steps", "it needs eval_steps", ("eval_steps",))]
    if strategy in ("never", "epoch") and steps is not None:
        message = f"eval_strategy {strategy} does not read it; take steps or leave one out"
        return [Problem("eval_steps", steps, message, ("eval_strategy",))]
    return []
