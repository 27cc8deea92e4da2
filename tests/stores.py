"""What trackers hold, read back by their own libraries."""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Step = tuple[int, float]

PANDAS = "ignore:For backward compatibility, 'str' dtypes"
"""For `filterwarnings`: mlflow's log_table under pandas 3."""


@contextmanager
def own_stores(root: Path) -> Iterator[str]:
    """Let trackers reach folders under `root` only; gives MLflow's address there.

    It is a folder: a database takes seconds to make. Trackio's folder is the test session's.
    """
    import wandb

    uri = (root / "mlflow-store").as_uri()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONFIG_DIR", str(root / "wandb-config"))
        patch.setenv("WANDB_CACHE_DIR", str(root / "wandb-cache"))
        patch.setenv("WANDB_DATA_DIR", str(root / "wandb-data"))
        patch.setenv("NETRC", str(root / "netrc"))
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        wandb.teardown()  # it reads the environment once
        yield uri
    wandb.teardown()


def tensorboard_scalars(run: Path, name: str) -> list[Step]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def tensorboard_texts(run: Path, tag: str) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tensors = events.Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in tensors]


def wandb_records(run: Path) -> list[Any]:
    """The records of the run's one offline folder: W&B's messages, in LevelDB's log format."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service writes the rest when it ends
    (path,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    return [Record.FromString(data) for data in _leveldb_records(path.read_bytes())]


def _leveldb_records(content: bytes) -> Iterator[bytes]:
    """Payloads: parts of at most a block, each with checksum, length and kind before it."""
    block, header = 32768, 7
    place, record = header, b""  # the file begins with a header of its own, of as many bytes
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += header
        record += content[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_history(run: Path) -> list[dict[str, Any]]:
    rows = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            keys = (item.key or "/".join(item.nested_key) for item in items)
            values = (json.loads(item.value_json) for item in items)
            rows.append(dict(zip(keys, values, strict=True)))
    return rows


def wandb_scalars(run: Path, name: str) -> list[Step]:
    return [(row["_step"], row[name]) for row in wandb_history(run) if name in row]


def trackio_logs(project: str, run_id: str) -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(project, run_id=run_id)


def trackio_scalars(project: str, run_id: str, name: str) -> list[Step]:
    logs = trackio_logs(project, run_id)
    return [(row["step"], row[name]) for row in logs if name in row]


def mlflow_run(uri: str, experiment: str) -> tuple[Any, Any]:
    """A client, and the experiment's one run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return client, run


def mlflow_scalars(uri: str, experiment: str, name: str) -> list[Step]:
    client, run = mlflow_run(uri, experiment)
    history = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in history)
