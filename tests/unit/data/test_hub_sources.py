"""Datasets of the Hugging Face Hub, offline, from a cache laid out as the Hub's library does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hf_errors
import pytest

from preftune.data.sources import open_source
from preftune.errors import DataError

OLD, NEW = "a" * 40, "b" * 40
SUBSETS = """---
configs:
- config_name: helpful
  data_files:
  - split: train
    path: helpful/*.jsonl
- config_name: harmless
  data_files:
  - split: train
    path: harmless/*.jsonl
---
"""
ASK = """
import json, sys
from preftune.data.sources import open_source
from preftune.errors import DataError
answers = {}
for name, split in json.loads(sys.argv[1]):
    try:
        source = open_source(name, split)
        rows = list(source.rows())
        assert rows == list(source.rows())
        assert (source.name, source.split, source.total) == (name, split, len(rows))
        answer = [source.revision, source.fingerprint, rows]
    except DataError as error:
        answer = str(error)
    answers[name + " " + split] = answer
print(json.dumps(answers))
"""


def lines(word: str, number: int) -> bytes:
    return "".join(json.dumps({"prompt": f"{word}{i}"}) + "\n" for i in range(number)).encode()


def hub_cache(hub: Path, repo: str, snapshots: dict[str, Any], refs: dict[str, str]) -> None:
    """Lay a dataset out as huggingface_hub does: blobs, links to them by commit, names."""
    base = hub / f"datasets--{repo.replace('/', '--')}"
    for commit, files in snapshots.items():
        for name, content in files.items():
            blob = base / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = base / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    for name, commit in refs.items():
        (base / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "refs" / name).write_text(commit)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without network says; the folder is hidden, as the real cache is."""
    home = tmp_path_factory.mktemp("home") / ".cache"
    new = {
        "data/train-00000-of-00001.jsonl": lines("new", 3),
        "data/test-00000-of-00001.jsonl": lines("test", 1),
    }
    hub_cache(
        home / "hub",
        "org/set",
        {OLD: {"train.jsonl": lines("old", 2)}, NEW: new},
        {"main": NEW, "v1": OLD, "refs/pr/2": OLD},
    )
    two = {"helpful/x.jsonl": lines("help", 2), "harmless/x.jsonl": lines("harm", 1)}
    hub_cache(home / "hub", "org/two", {OLD: {"README.md": SUBSETS.encode(), **two}}, {"main": OLD})
    broken = {"train.jsonl": b"{\n"}
    hub_cache(home / "hub", "org/broken", {OLD: broken}, {"main": OLD})
    names = "org/set org/set@v1 org/set@refs/pr/2 org/set@v9 org/two org/two:harmless@main"
    names += f" org/set@{OLD} org/two:helpful org/two:x org/none org/broken a/b:@"
    questions = [(name, "train") for name in names.split()]
    questions += [("org/set", s) for s in ("test", "valid", "train[:1]+test", "train[:0]")]
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK, json.dumps(questions)],
        env=env | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr
    assert "examples/s" not in done.stderr
    return json.loads(done.stdout)


class TestHub:
    def test_the_default_revision(self, answers: dict[str, Any]) -> None:
        commit, _, rows = answers["org/set train"]
        assert commit == NEW
        assert rows == [[f"org/set[{i}]", {"prompt": f"new{i}"}] for i in range(3)]
        assert answers["org/set test"][2] == [["org/set[0]", {"prompt": "test0"}]]

    def test_a_revision_by_tag_ref_and_commit_is_the_same_source(
        self, answers: dict[str, Any]
    ) -> None:
        by_tag = answers["org/set@v1 train"]
        assert by_tag[0] == OLD
        assert [row["prompt"] for _, row in by_tag[2]] == ["old0", "old1"]
        assert answers["org/set@refs/pr/2 train"] == by_tag
        assert answers[f"org/set@{OLD} train"] == by_tag

    def test_fingerprints_tell_commits_splits_and_subsets_apart(
        self, answers: dict[str, Any]
    ) -> None:
        names = ["org/set train", "org/set@v1 train", "org/set test", "org/two:helpful train"]
        names += ["org/two:harmless@main train"]
        assert len({answers[name][1] for name in names}) == len(names)

    def test_subsets(self, answers: dict[str, Any]) -> None:
        rows = answers["org/two:harmless@main train"][2]
        assert rows == [["org/two[0]", {"prompt": "harm0"}]]
        known = "; give one of org/two:helpful, org/two:harmless"
        assert answers["org/two train"] == (
            f"dataset 'org/two': it has 2 subsets, none of them the default{known}"
        )
        assert answers["org/two:x train"] == f"dataset 'org/two:x': it has no subset 'x'{known}"

    def test_splits(self, answers: dict[str, Any]) -> None:
        rows = answers["org/set train[:1]+test"][2]
        assert [row["prompt"] for _, row in rows] == ["new0", "test0"]
        assert answers["org/set valid"] == (
            "dataset 'org/set': it has no split 'valid'; choose one of train, test"
        )

    def test_what_is_not_in_the_cache(self, answers: dict[str, Any]) -> None:
        text = answers["org/none train"]
        assert text.startswith("dataset 'org/none': no local file or folder has that name")
        assert "(HF_HUB_OFFLINE is set)" in text
        assert "give a path that exists, or run once with a network" in text
        assert "does not hold 'org/set' at revision 'v9'" in answers["org/set@v9 train"]

    def test_what_cannot_be_read(self, answers: dict[str, Any]) -> None:
        assert "corresponds to no data" in answers["org/set train[:0]"]
        text = answers["org/broken train"]
        assert f"split 'train' of commit {OLD} cannot be loaded (" in text
        assert "JSON parse error" in text

    def test_names_that_are_no_hub_id(self, answers: dict[str, Any]) -> None:
        assert "is written org/name[:subset][@revision]" in answers["a/b:@ train"]
        with pytest.raises(DataError, match=r"'org/two words'.*it is no Hub id \("):
            open_source("org/two words", "train")

    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (hf_errors.GatedRepoError, "accept them at https://huggingface.co/datasets/org/set"),
            (hf_errors.RepositoryNotFoundError, "the Hub has no dataset 'org/set' that you may"),
            (hf_errors.RevisionNotFoundError, "it has no revision 'v1'; give a branch, a tag"),
            (OSError, "fetching it from the Hugging Face Hub failed (OSError: no space left)"),
        ],
    )
    def test_what_the_hub_answers(
        self, monkeypatch: pytest.MonkeyPatch, error: type[Exception], text: str
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            # Made without __init__, whose arguments (a response) differ between versions.
            failure = error.__new__(error, "no space left")
            failure.args = ("no space left",)
            raise failure

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(DataError) as caught:
            open_source("org/set@v1", "train")
        message = str(caught.value)
        assert message.startswith("dataset 'org/set@v1': ")
        assert text in message
