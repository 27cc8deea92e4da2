"""What a run says while it works."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section

Progress = Literal["auto", "rich", "plain", "none"]


@dataclass(kw_only=True)
class LoggingConfig(Section):
    """Metrics and progress."""

    logging_steps: int = 10
    """Optimizer steps between two lines of metrics, 1 or more."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live bar; plain: a line a logging step; none: nothing;
    auto: rich in a terminal, else plain."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        return count("logging_steps", self.logging_steps)
