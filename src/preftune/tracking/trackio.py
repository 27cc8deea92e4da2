"""Trackio: a store of its own on this machine, which `trackio show` shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas
import trackio
from trackio.sqlite_storage import SQLiteStorage

from preftune.tracking.tracker import Status, TrackedRun


class TrackioTracker:
    """Logs to Trackio's store (TRACKIO_DIR), where projects of all runs lie together."""

    def __init__(self, run: TrackedRun) -> None:
        """Take up the run by its id, because others may have its name."""
        self._run = trackio.init(
            project=run.project,
            name=run.name,
            config=dict(run.facts),
            embed=False,
            # What they log before the id is set would belong to another run.
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._run.id = run.id
        last = SQLiteStorage.get_max_step_for_run(run.project, run.name, run_id=run.id)
        self.last_step = -1 if last is None else last

    def append(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log one row; Trackio's own thread writes it within a second."""
        row: dict[str, Any] = dict(metrics)
        if samples:
            row["samples"] = trackio.Table(dataframe=pandas.DataFrame(samples))
        self._run.log(row, step=step)

    def close(self, status: Status) -> None:
        """Wait until all is written."""
        self._run.finish()
