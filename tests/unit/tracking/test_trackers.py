"""Each tracker's store, read back by the tracker's own library."""

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from preftune.errors import ConfigError
from preftune.tracking import tracker
from preftune.tracking.follower import Followers
from preftune.tracking.tracker import TrackedRun, check_trackers, open_tracker
from tests import stores

RUN_ID = "0123456789abcdef"
SAMPLES = [
    {"step": 2, "prompt": "Why?", "policy": "# Because", "num_tokens": {"policy": 3}, "flags": []},
    {"step": 2, "prompt": "Who?", "policy": "Me", "num_tokens": {"policy": 1}, "flags": ["a", "b"]},
]
ROWS = [
    {"prompt": "Why?", "policy": "# Because", "num_tokens/policy": 3, "flags": ""},
    {"prompt": "Who?", "policy": "Me", "num_tokens/policy": 1, "flags": "a, b"},
]
"""The same in a table."""

pytestmark = pytest.mark.filterwarnings(stores.PANDAS)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with stores.own_stores(tmp_path_factory.mktemp("stores")) as address:
        yield address


def tracked(folder: Path) -> TrackedRun:
    facts = {"beta": 0.1, "loss_type": "dpo", "betas": [0.9, 0.95], "model_fingerprint": "abc"}
    return TrackedRun(folder, RUN_ID, "one run", f"test {folder.name}", facts)


def log(folder: Path, steps: Sequence[int]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            record = {"step": step, "loss": step / 4, "eval/my set@2/loss": math.nan}
            file.write(json.dumps(record) + "\n")


def follow(name: str, folder: Path) -> None:
    """Bring a tracker what it lacks, as a process does, from start to end."""
    told: list[str] = []
    files = [folder / "metrics.jsonl", folder / "samples.jsonl"]
    openers = {name: partial(open_tracker, name)}  # pyright: ignore[reportArgumentType]
    Followers(openers, tracked(folder), files, told.append).close("finished")
    assert told == []


def in_two_goes(name: str, folder: Path) -> None:
    log(folder, [1, 2, 3])
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SAMPLES))
    follow(name, folder)
    log(folder, [4, 5])
    follow(name, folder)


LOSSES = [(step, step / 4) for step in (1, 2, 3, 4, 5)]


def test_tensorboard(tmp_path: Path) -> None:
    in_two_goes("tensorboard", tmp_path)
    assert stores.tensorboard_scalars(tmp_path, "loss") == LOSSES
    nans = stores.tensorboard_scalars(tmp_path, "eval/my set@2/loss")
    assert [step for step, value in nans if math.isnan(value)] == [1, 2, 3, 4, 5]
    ((step, text),) = stores.tensorboard_texts(tmp_path, "samples/0")
    assert step == 2
    assert "**prompt**\n\n    Why?" in text
    assert "**policy**\n\n    # Because" in text  # as it is, not as a heading
    ((_, settings),) = stores.tensorboard_texts(tmp_path, "run")
    assert "    beta: 0.1\n" in settings


def test_tensorboard_after_a_step_that_was_cut_off(tmp_path: Path) -> None:
    log(tmp_path, [1, 2, 3])
    follow("tensorboard", tmp_path)
    cut = open_tracker("tensorboard", tracked(tmp_path))
    assert cut.last_step == 3
    cut._writer.add_scalar("loss", 9.0, 4)  # pyright: ignore[reportAttributeAccessIssue]
    cut.close("failed")
    log(tmp_path, [4, 5])
    follow("tensorboard", tmp_path)
    assert stores.tensorboard_scalars(tmp_path, "loss") == LOSSES
    assert len(stores.tensorboard_texts(tmp_path, "run")) == 1


def test_wandb_offline(tmp_path: Path, uri: str) -> None:
    in_two_goes("wandb", tmp_path)  # one folder: `wandb_records` would find more
    assert stores.wandb_scalars(tmp_path, "loss") == LOSSES
    assert math.isnan(stores.wandb_scalars(tmp_path, "eval/my set@2/loss")[0][1])
    records = stores.wandb_records(tmp_path)
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    said = run.run_id, run.display_name, run.project
    assert said == (RUN_ID, "one run", f"test {tmp_path.name}")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config | {"beta": 0.1, "loss_type": "dpo", "betas": [0.9, 0.95]} == config
    (path,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/samples_2_*.json")
    table = json.loads(path.read_text())
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == ROWS


def test_trackio(tmp_path: Path, uri: str) -> None:
    in_two_goes("trackio", tmp_path)
    project = tracked(tmp_path).project
    import trackio

    (run,) = trackio.Api().runs(project)
    assert (run.id, run.name) == (RUN_ID, "one run")
    assert run.config is not None
    assert run.config | {"beta": 0.1, "model_fingerprint": "abc"} == run.config
    assert stores.trackio_scalars(project, RUN_ID, "loss") == LOSSES
    tables = [row["samples"] for row in stores.trackio_logs(project, RUN_ID) if "samples" in row]
    assert [table["_value"] for table in tables] == [ROWS]


def test_trackio_keeps_runs_of_one_name_apart(tmp_path: Path, uri: str) -> None:
    log(tmp_path, [1])
    follow("trackio", tmp_path)
    run = tracked(tmp_path)
    other = open_tracker("trackio", TrackedRun(run.folder, "other", run.name, run.project, {}))
    assert other.last_step == -1
    other.append(7, {"loss": 7.0}, [])
    other.close("finished")
    log(tmp_path, [2])
    follow("trackio", tmp_path)
    assert stores.trackio_scalars(run.project, RUN_ID, "loss") == LOSSES[:2]
    assert stores.trackio_scalars(run.project, "other", "loss") == [(7, 7.0)]


def test_mlflow(tmp_path: Path, uri: str) -> None:
    in_two_goes("mlflow", tmp_path)
    project = tracked(tmp_path).project
    assert stores.mlflow_scalars(uri, project, "loss") == LOSSES
    assert len(stores.mlflow_scalars(uri, project, "eval/my set_2/loss")) == 5
    client, run = stores.mlflow_run(uri, project)
    assert run.data.params | {"beta": "0.1", "betas": "[0.9, 0.95]"} == run.data.params
    assert (run.info.run_name, run.info.status) == ("one run", "FINISHED")
    table = client.load_table(run.info.experiment_id, "samples/step-00000002.json")
    assert table[list(ROWS[0])].to_dict("records") == ROWS


@pytest.mark.slow
def test_mlflow_without_an_address_has_a_database_in_the_run_folder(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr("preftune.tracking.follower.CLOSE_SECONDS", 300)
    in_two_goes("mlflow", tmp_path)
    own = f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert stores.mlflow_scalars(own, tracked(tmp_path).project, "loss") == LOSSES
    assert (tmp_path / "mlflow" / "artifacts").is_dir()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_package_that_is_not_installed_is_named(name, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"report_to is '{name}'.*preftune\[{name}\]"):
        check_trackers([name])


def test_wandb_without_an_account(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    check_trackers(["wandb"])  # offline
    check_trackers(None)
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"report_to is 'wandb'.*WANDB_MODE=offline"):
        check_trackers(["wandb"])
    check_trackers(["wandb"], is_main=False)  # another rank needs none
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    wandb.teardown()
    check_trackers(["wandb"])
    wandb.teardown()


def test_trackio_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(ConfigError, match="TRACKIO_SPACE_ID is set"):
        check_trackers(["trackio"])
