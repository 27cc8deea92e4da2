"""Tokens and passwords of the environment and the config are in no file that a run writes."""

import json
import os
import sys
from pathlib import Path

import pytest

from preftune.cli.main import main
from tests import stores
from tests.runs import arguments, tiny_settings

SECRETS = {
    "HF_TOKEN": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "OPENAI_API_KEY": "sk-proj-0123456789abcdefghijklmnop",
    "GITHUB_TOKEN": "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "MY_DATABASE_PASSWORD": "correct horse battery",
}


def holding(root, texts):
    """Files under `root` that hold one of the texts, in their bytes or in their names."""
    found = []
    for path in root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        found += [(path, t) for t in texts if t.encode() in content or t in str(path)]
    return found


@pytest.fixture
def own_stores(tmp_path):
    with stores.own_stores(tmp_path):
        yield


@pytest.mark.filterwarnings(stores.PANDAS)
def test_secrets_are_in_no_file_that_a_run_writes(tmp_path, monkeypatch, own_stores):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    settings = tiny_settings(
        tmp_path,
        checkpointing_steps=2,
        report_to=["tensorboard", "wandb", "trackio", "mlflow"],
        test_size=4,
        exp_name="run of " + SECRETS["GITHUB_TOKEN"],
        run_name=SECRETS["HF_TOKEN"],
    )
    model = tmp_path / ("sk-proj-" + "9" * 30)
    (tmp_path / "model").rename(model)
    settings["model_name_or_path"] = str(model)
    words = ["train", *arguments(settings)]
    monkeypatch.setattr(sys, "argv", ["preftune", *words, *SECRETS.values()])
    assert main(words) == 0
    texts = [*SECRETS.values(), model.name]
    assert list((tmp_path / "run" / "wandb").iterdir())
    trackio = Path(os.environ["TRACKIO_DIR"])
    written = tmp_path / "run", tmp_path / "cache", tmp_path / "mlflow-store", trackio
    assert [found for folder in written for found in holding(folder, texts)] == []
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert "REDACTED" in " ".join(manifest["command"])
    assert manifest["config"]["run_name"] == "REDACTED"
    # What was left out is left out of both sides when a run is compared with its folder.
    assert main(words) == 0


@pytest.mark.parametrize("key", ["dataset_name", "model_name_or_path", "cache_dir", "output_dir"])
def test_a_token_in_an_address_is_not_repeated(tmp_path, monkeypatch, capsys, key):
    monkeypatch.chdir(tmp_path)
    address = "https://someone:s3cr3t-t0ken@example.com/org/pairs"
    words = ["train", *arguments(tiny_settings(tmp_path) | {key: address})]
    monkeypatch.setattr(sys, "argv", ["preftune", *words])
    main(words)
    told = capsys.readouterr()
    assert "s3cr3t" not in told.err + told.out
    if key.endswith("name") or key.startswith("model"):
        assert "example.com" in told.err
    for folder in (tmp_path / "run", tmp_path / "cache"):
        assert holding(folder, ["s3cr3t"]) == []
