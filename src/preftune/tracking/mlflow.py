"""MLflow: a tracking server, or a database in the run's folder."""

import os
import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

# The follower tries again by itself; and nobody needs to be told how a database is made.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from preftune.tracking.tracker import Status, TrackedRun

RUN_ID = "preftune.run_id"
STEP = "step"
"""Logged as a metric, too: its latest value is the last step that is there."""
STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "diverged": "FAILED", "failed": "FAILED"}
MOST_PARAMS = 100
"""In one request."""
LONGEST_PARAM = 6000


class MlflowTracker:
    """Logs to MLFLOW_TRACKING_URI, or to a database in the run's folder."""

    def __init__(self, run: TrackedRun) -> None:
        """Take up the run that has this run's id as a tag."""
        self._client, experiment = _experiment(run)
        # A request that timed out may have made one all the same: the first one counts.
        found = self._client.search_runs(
            [experiment],
            filter_string=f"tags.`{RUN_ID}` = '{run.id}'",
            order_by=["attributes.start_time ASC"],
            max_results=1,
        )
        if found:
            self._id = found[0].info.run_id
            self.last_step = int(found[0].data.metrics.get(STEP, -1))
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.name, tags={RUN_ID: run.id})
        self._id, self.last_step = made.info.run_id, -1
        params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in run.facts.items()]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + MOST_PARAMS])

    def append(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Log one step in one request, after its samples as a table."""
        if samples:
            self._table(f"samples/step-{step:08d}.json", samples)
        now = int(time.time() * 1000)
        values = {_key(name): value for name, value in metrics.items()} | {STEP: step}
        self._client.log_batch(
            self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()]
        )

    def _table(self, path: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if any(file.path == path for file in self._client.list_artifacts(self._id, "samples")):
            return  # or the rows would be there twice
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self._client.log_table(self._id, columns, path)

    def close(self, status: Status) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._id, STATUS[status])


def _experiment(run: TrackedRun) -> tuple[MlflowClient, str]:
    """A client, and the id of the experiment that the run belongs to."""
    uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
    if not uri:
        own = run.folder.absolute() / "mlflow"
        own.mkdir(exist_ok=True)
        uri, artifacts = f"sqlite:///{own / 'mlflow.db'}", (own / "artifacts").as_uri()
    client = MlflowClient(tracking_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
    found = client.get_experiment_by_name(name)
    if found is not None:
        return client, found.experiment_id
    return client, client.create_experiment(name, artifact_location=artifacts)


def _key(name: str) -> str:
    """A metric's name in the characters that MLflow takes."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name))
