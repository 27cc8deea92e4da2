"""When to evaluate on held-out pairs."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem
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

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        steps = self.eval_steps
        in_range = 0 < steps < 1 if isinstance(steps, float) else steps is None or steps >= 1
        if not in_range:
            message = "it must be a number of steps (1 or more) or a part between 0 and 1"
            if isinstance(steps, float) and steps >= 1:
                message = (
                    "with a decimal point it is a part of the run, which must be below 1; a "
                    "number of steps is a whole number (1 is every step)"
                )
            found.append(Problem("eval_steps", steps, message))
        if self.eval_strategy == "steps" and steps is None:
            message = "it needs eval_steps"
            found.append(Problem("eval_strategy", "steps", message, ("eval_steps",)))
        if self.eval_strategy in ("never", "epoch") and steps is not None:
            message = (
                f"eval_strategy {self.eval_strategy} does not read it; take steps or leave one out"
            )
            found.append(Problem("eval_steps", steps, message, ("eval_strategy",)))
        return found
