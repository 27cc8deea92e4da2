"""Where a run's metrics are followed besides `metrics.jsonl`: what `report_to` names."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, assert_never

from preftune.config.logging import TrackerName
from preftune.errors import ConfigError, Findings

Status = Literal["finished", "interrupted", "diverged", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it takes it up."""

    folder: Path
    """The run's."""
    id: str
    """The same whenever the run goes on; letters and digits."""
    name: str
    project: str
    facts: Mapping[str, Any]
    """The resolved configuration, and fingerprints of data and model; plain values."""


class Tracker(Protocol):
    """Holds the metrics of one run, in a store that outlives the process.

    To construct one is to take up the run in that store: the same whenever it goes on.
    """

    last_step: int
    """The last step that the store held, whole, when the run was taken up; -1 for none."""

    def append(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep what there is of one step; steps come in order, each once.

        Args:
            step: of the run.
            metrics: by their full names; may be empty.
            samples: answers to prompts, one a row, all with the same keys; may be empty.
        """
        ...

    def close(self, status: Status) -> None:
        """Write what is held back, and say how the run ended."""
        ...


def check_trackers(names: list[TrackerName] | None, *, is_main: bool = True) -> None:
    """Refuse a tracker whose package is not installed, or that lacks an account.

    Args:
        names: of trackers.
        is_main: whether this process is the one that opens them.

    Raises:
        ConfigError: naming the extra to install, or how to log in.
    """
    findings = Findings()
    for name in names or ():
        with findings:
            if find_spec(name) is None:
                raise ConfigError(
                    f"report_to is {name!r}, and the package {name} is not installed; "
                    f"`pip install 'preftune[{name}]'`, or leave it out"
                )
            if is_main:
                _check_account(name)
    findings.raise_all()


def _check_account(name: TrackerName) -> None:
    match name:
        case "wandb":
            from preftune.tracking.wandb import lacks_account

            if lacks_account():
                raise ConfigError(
                    "report_to is 'wandb', and no key of an account is found; `wandb login`, set "
                    "WANDB_API_KEY, or set WANDB_MODE=offline and `wandb sync` the run later"
                )
        case "trackio":
            for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
                if os.environ.get(variable):
                    raise ConfigError(
                        f"report_to is 'trackio', and {variable} is set: preftune writes to this "
                        "machine's store only; unset it, and `trackio sync` the project"
                    )
        case "tensorboard" | "mlflow":
            pass
        case _:
            assert_never(name)


def open_tracker(name: TrackerName, run: TrackedRun) -> Tracker:
    """Take up a run in a tracker's store; imports its package."""
    match name:
        case "tensorboard":
            from preftune.tracking.tensorboard import TensorBoardTracker

            return TensorBoardTracker(run)
        case "wandb":
            from preftune.tracking.wandb import WandbTracker

            return WandbTracker(run)
        case "trackio":
            from preftune.tracking.trackio import TrackioTracker

            return TrackioTracker(run)
        case "mlflow":
            from preftune.tracking.mlflow import MlflowTracker

            return MlflowTracker(run)
        case _:
            assert_never(name)
