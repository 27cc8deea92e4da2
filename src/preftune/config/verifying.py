"""The configuration of `preftune verify-resume`."""

from dataclasses import dataclass, fields

from preftune.config.experiment import ExperimentConfig
from preftune.config.problem import Problem, count
from preftune.config.section import Section


@dataclass(kw_only=True)
class VerifyingConfig(Section):
    """How long to train, and where to stop."""

    verify_steps: int = 20
    """Optimizer steps of the straight run, 2 or more."""

    verify_stop_after: int | None = None
    """The step after which the other run is stopped and resumed, below `verify_steps`. Unset:
    half-way."""

    def __post_init__(self) -> None:
        """Stop half-way unless told otherwise."""
        if self.verify_stop_after is None:
            self.verify_stop_after = max(1, self.verify_steps // 2)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("verify_steps", self.verify_steps, least=2)
        found += count("verify_stop_after", self.verify_stop_after)
        if not found and self.stop_after >= self.verify_steps:
            message = f"it must be below verify_steps, which is {self.verify_steps}"
            found.append(Problem("verify_stop_after", self.stop_after, message, ("verify_steps",)))
        return found

    @property
    def stop_after(self) -> int:
        """`verify_stop_after`, filled."""
        assert self.verify_stop_after is not None  # by __post_init__
        return self.verify_stop_after


@dataclass(kw_only=True)
class VerifyResumeConfig(ExperimentConfig, VerifyingConfig):
    """The training run whose resuming is verified, flat, and how."""

    def experiment(self) -> ExperimentConfig:
        """The run alone."""
        own = {field.name: getattr(self, field.name) for field in fields(ExperimentConfig)}
        return ExperimentConfig(**own)
