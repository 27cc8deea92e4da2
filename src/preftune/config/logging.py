"""What a run says while it works."""

from dataclasses import dataclass
from typing import Annotated, Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section
from preftune.config.typed import AlsoSpelled

Progress = Literal["auto", "rich", "plain", "none"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


@dataclass(kw_only=True)
class LoggingConfig(Section):
    """Metrics and progress."""

    logging_steps: int = 10
    """Optimizer steps between two lines of metrics, 1 or more."""

    report_to: Annotated[list[TrackerName] | None, AlsoSpelled(none=None)] = None
    """Where metrics go besides metrics.jsonl, which is always written: a list of names, or one.
    tensorboard: event files in the run's folder; wandb: Weights & Biases (WANDB_MODE=offline: a
    folder for `wandb sync`); trackio: its store on this machine; mlflow: MLFLOW_TRACKING_URI, or a
    database in the run's folder. Unset, none or []: nowhere else."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live view; plain: a line every ten seconds; none: nothing,
    for which --quiet is another word; auto: rich in a terminal, else plain."""

    def __post_init__(self) -> None:
        """Give "nowhere else" one form."""
        self.report_to = self.report_to or None

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("logging_steps", self.logging_steps)
        names = self.report_to or []
        if len(set(names)) < len(names):
            found.append(Problem("report_to", names, "a name is given twice; keep one"))
        return found
