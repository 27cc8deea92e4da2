"""Pushing to a hub on loopback: read back, gone on with, refused before weights load."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import ExperimentConfig, train
from preftune.cli.main import main
from preftune.config.parser import parse_config
from preftune.errors import ConfigError, PushFailed
from preftune.hub.repository import MARKER
from preftune.recipes import train as recipe
from tests.hub_server import READER, STRANGER, WRITER, HubServer
from tests.runs import arguments, tiny_config, tiny_settings

# huggingface_hub's own call, by a name that its HTTP client is about to change.
pytestmark = pytest.mark.filterwarnings(r"ignore:Use 'content=<:DeprecationWarning")

REPO = "ann/tiny"
PUSH: dict[str, Any] = {"push_to_hub": True, "hub_repo_id": REPO}
SHORT: dict[str, Any] = {"max_train_steps": 1, "num_epochs": None}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub, and a client that asks it: as HF_ENDPOINT and HF_TOKEN would have it."""
    with HubServer() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hf"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        # What PEFT calls is a method of this one, made when huggingface_hub was imported.
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(recipe.StartModel, "load", load)


def manifest(root: Path) -> dict[str, Any]:
    return json.loads((root / "run" / "run.json").read_text())


def uploads(hub: HubServer) -> list[str]:
    return [request for request in hub.requests if request.startswith("PUT")]


def test_a_pushed_model_reads_back_to_the_same_numbers(tmp_path: Path, hub: HubServer) -> None:
    config = tiny_config(tmp_path, test_size=5, eval_steps=1, **SHORT, **PUSH)
    result = train(config)
    files = hub.repos[REPO].files()
    assert hub.repos[REPO].private
    assert files.keys() - {".gitattributes", MARKER} == {
        p.name for p in result.folder.final.iterdir()
    }
    there = AutoModelForCausalLM.from_pretrained(REPO)
    here = AutoModelForCausalLM.from_pretrained(result.folder.final)
    tokenizer = AutoTokenizer.from_pretrained(REPO)
    ids = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    assert torch.equal(there(ids).logits, here(ids).logits)
    commit = hub.repos[REPO].branches["main"]
    told = {"repository": REPO, "revision": "main", "status": "pushed", "commit": commit}
    assert result.manifest["hub"] == manifest(tmp_path)["hub"] == told
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    # No token, and no folder of this machine, in anything but the metrics of the tokenizer itself.
    sent = b"".join(content for path, content in files.items() if path.endswith((".md", ".yaml")))
    assert WRITER.encode() not in sent
    assert str(tmp_path).encode() not in sent
    assert WRITER not in "".join(p.read_text() for p in (tmp_path / "run").glob("*.*"))
    # The settings repeat the run, for who has the data.
    path = tmp_path / "again.yaml"
    path.write_bytes(files[MARKER])
    again = parse_config(ExperimentConfig, [str(path)])
    assert (again.push_to_hub, again.hub_repo_id, again.max_train_steps) == (False, None, 1)
    assert (again.model_name_or_path, again.dataset_name) == ("model", "pairs.jsonl")
    # The same command again has nothing to do, and asks the hub nothing.
    hub.requests.clear()
    assert train(config).manifest == result.manifest
    assert hub.requests == []


def test_defaults_push_nothing(tmp_path: Path, hub: HubServer) -> None:
    train(tiny_config(tmp_path, **SHORT))
    assert hub.requests == []
    assert "hub" not in manifest(tmp_path)


# PEFT's own call, by a name that transformers is about to change.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_is_pushed_to_a_branch_of_its_own(tmp_path: Path, hub: HubServer) -> None:
    hub.add(REPO, {"model.safetensors": b"another's", "README.md": b"mine"})
    config = tiny_config(tmp_path, use_lora=True, hub_revision="lora-1", **SHORT, **PUSH)
    result = train(config)
    assert hub.repos[REPO].files()["README.md"] == b"mine"  # main is as it was
    assert "model.safetensors" not in hub.repos[REPO].files("lora-1")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    there = PeftModel.from_pretrained(base, REPO, revision="lora-1")(ids).logits
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(there, PeftModel.from_pretrained(base, result.folder.final)(ids).logits)
    card = hub.repos[REPO].files("lora-1")["README.md"].decode()
    assert f'"{REPO}", revision="lora-1")' in card


def test_a_finished_run_is_pushed_later_without_training(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(tmp_path, **SHORT)
    train(ExperimentConfig(**settings))
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    monkeypatch.setattr(recipe, "_load_pairs", None)  # nothing is trained
    train(ExperimentConfig(**settings, **PUSH))
    assert hub.repos[REPO].files()["model.safetensors"] == weights


def test_an_upload_that_is_cut_off_goes_on_without_training(
    tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.lfs.http_backoff", _without_patience)
    config = tiny_config(tmp_path, **SHORT, **PUSH)
    hub.drop_after = 20_000
    with pytest.raises(PushFailed, match="run the same command again to go on pushing"):
        train(config)
    final = tmp_path / "run" / "final" / "model.safetensors"
    before = (final.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes())
    assert manifest(tmp_path)["status"] == "finished"
    assert manifest(tmp_path)["hub"]["status"] == "trained, not yet pushed"
    assert "model.safetensors" not in hub.repos[REPO].files()  # nothing, rather than a half

    # The file comes whole, and the commit does not.
    hub.drop_after, hub.down = None, True
    with pytest.raises(PushFailed, match="the hub is closed"):
        train(config)
    assert len(hub.objects) == 1
    sent = len(uploads(hub))

    hub.down = False
    monkeypatch.setattr(recipe, "_load_pairs", None)  # nothing is trained
    train(config)
    assert len(uploads(hub)) == sent  # what is there is not sent again
    assert hub.repos[REPO].files()["model.safetensors"] == before[0] == final.read_bytes()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before[1]


def _without_patience(method: str, url: str, **options: Any) -> Any:
    from huggingface_hub.utils import http_backoff

    return http_backoff(method, url, max_retries=0, **options)  # type: ignore[arg-type]


def test_checkpoints_are_pushed_while_training_goes_on(tmp_path: Path, hub: HubServer) -> None:
    every = {"checkpointing_steps": 2, "keep_last_n_checkpoints": 1}
    train(tiny_config(tmp_path, hub_strategy="all_checkpoints", **every, **PUSH))
    files = hub.repos[REPO].files()
    steps = {path.split("/")[1] for path in files if path.startswith("checkpoints/")}
    assert steps == {"step-00000002", "step-00000004", "step-00000006"}  # though one is kept here
    last = tmp_path / "run" / "checkpoints" / "step-00000006"
    for path in last.iterdir():
        assert files[f"checkpoints/{last.name}/{path.name}"] == path.read_bytes()
    assert "model.safetensors" in files
    assert list((tmp_path / "run" / ".to-push").iterdir()) == []


@pytest.mark.slow
def test_the_newest_checkpoint_takes_the_place_of_the_one_before(
    tmp_path: Path, hub: HubServer
) -> None:
    train(tiny_config(tmp_path, hub_strategy="checkpoint", checkpointing_steps=2, **PUSH))
    files = hub.repos[REPO].files()
    state = json.loads(files["last-checkpoint/state.json"])
    assert state["step"] == 6
    assert not any(path.startswith("checkpoints/") for path in files)


@pytest.mark.slow
def test_a_hub_that_fails_stops_no_training(
    tmp_path: Path, hub: HubServer, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.down = True
    config = tiny_config(
        tmp_path, hub_strategy="checkpoint", checkpointing_steps=2, progress="plain", **PUSH
    )
    with pytest.raises(PushFailed):
        train(config)
    assert manifest(tmp_path)["status"] == "finished"
    assert "could not be pushed to ann/tiny (" in capfd.readouterr().err
    hub.down = False
    train(config)
    assert json.loads(hub.repos[REPO].files()["last-checkpoint/state.json"])["step"] == 6


REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no token": ({}, None, r"there is no token: log in with `hf auth login`, or set HF_TOKEN"),
    "bad token": ({}, "hf_wrong", r"does not know the token: log in anew"),
    "read token": ({}, READER, r"the token of ann may only read; give one that may write"),
    "stranger": ({}, STRANGER, r"bob may not make it for ann; give a repository such as bob/tiny"),
    "theirs": ({"hub_repo_id": "ann/open"}, STRANGER, r"bob may not write there \(.*Forbidden"),
    "org": ({"hub_repo_id": "club/x"}, WRITER, r"ann may not make it for club"),
    "content": ({"hub_repo_id": "ann/full"}, WRITER, r"holds model.safetensors, which would be ov"),
    "other run": ({"hub_repo_id": "ann/run"}, WRITER, r"the model of another preftune run"),
    "public": ({"hub_repo_id": "ann/open", "hub_private": None}, WRITER, r"which is public, and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_told_before_weights_load(
    tmp_path: Path,
    hub: HubServer,
    no_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    hub.add("ann/full", {"model.safetensors": b"x"})
    hub.add("ann/run", {MARKER: b"# preftune run 0123456789abcdef\n", "model.safetensors": b"x"})
    hub.add("ann/open", {}, private=False)
    options, token, text = REFUSED[case]
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    settings = tiny_settings(tmp_path, **(PUSH | {"hub_private": False} | options))
    with pytest.raises(ConfigError, match=text) as told:
        train(ExperimentConfig(**settings))
    assert told.value.exit_code == 2
    assert not (tmp_path / "run").exists()
    assert hub.repos.keys() == {"ann/full", "ann/run", "ann/open"}  # none was made


def test_no_hub_and_no_network_are_told(
    tmp_path: Path, hub: HubServer, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be asked whose the token is"):
        train(tiny_config(tmp_path, **PUSH))


def test_check_makes_no_repository(
    tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments(tiny_settings(tmp_path, **PUSH))]) == 0
    assert hub.repos == {}
    assert "GET /api/whoami-v2" in hub.requests


# ---------------------------------------------------------------- whole commands, killed


def command(tmp_path: Path, hub: HubServer, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": WRITER,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    words = arguments(tiny_settings(tmp_path, **SHORT, **PUSH))
    return subprocess.Popen(
        [sys.executable, *(more or ("-m", "preftune")), "train", *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_upload(hub: HubServer, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not hub.received or not hub.received[-1]:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_an_upload_that_is_killed_goes_on(
    tmp_path: Path, hub: HubServer, number: int, code: int
) -> None:
    hub.slow_seconds = 1.0  # a block
    with command(tmp_path, hub) as process:
        wait_for_upload(hub, process)
        process.send_signal(number)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert code != 75 or "run the same command again to go on pushing" in told
    final = tmp_path / "run" / "final" / "model.safetensors"
    before = (final.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes())
    hub.slow_seconds = 0.0
    with command(tmp_path, hub) as process:
        assert process.wait(120) == 0, process.communicate()[1]
    files = hub.repos[REPO].files()
    assert files["model.safetensors"] == before[0] == final.read_bytes()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before[1]
    assert manifest(tmp_path)["hub"]["status"] == "pushed"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_push_once(tmp_path: Path, hub: HubServer) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "preftune")
    hub.slow_seconds = 0.2
    with command(tmp_path, hub, *launcher) as process:
        told = process.communicate(timeout=200)[1]
    assert process.returncode == 0, told
    assert len(uploads(hub)) == 1
    assert sum(request.endswith("/commit/main") for request in hub.requests) == 1
    final = tmp_path / "run" / "final" / "model.safetensors"
    assert hub.repos[REPO].files()["model.safetensors"] == final.read_bytes()
