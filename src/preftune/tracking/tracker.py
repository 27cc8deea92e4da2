"""Where metrics go: `metrics.jsonl` always, and what `report_to` names."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, assert_never

from preftune.errors import ConfigError

TrackerName = Literal["tensorboard"]


class Tracker(Protocol):
    """Takes one record a logging step."""

    def append(self, record: Mapping[str, float]) -> None:
        """Keep a record; it has `step` and metrics by their full names."""
        ...

    def close(self) -> None:
        """Write what is held back."""
        ...


def check_trackers(names: list[TrackerName] | None) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: naming the extra to install.
    """
    for name in names or ():
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to is {name!r}, and the package {name} is not installed; "
                f"`pip install 'preftune[{name}]'`, or leave it out"
            )


def open_tracker(name: TrackerName, run_folder: Path, step: int) -> Tracker:
    """A tracker of a run that starts, or goes on, after `step`."""
    match name:
        case "tensorboard":
            from preftune.tracking.tensorboard import TensorBoardLog

            return TensorBoardLog(run_folder / "tensorboard", step)
        case _:
            assert_never(name)
