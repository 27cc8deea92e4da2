"""Tokenised sources through the Hub; a folder stands for the Hub's side of the wire."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

from preftune.data import hub_cache
from preftune.data.hub_cache import HubCache
from preftune.data.pairs import load_pairs
from preftune.errors import CacheError
from tests.tiny import make_pairs, tiny_tokenizer, write_jsonl


class FolderHub:
    """The calls of huggingface_hub that are used, on a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def whoami(self) -> dict[str, str]:
        return {"name": "ann"}

    def create_repo(self, repo: str, *, repo_type: str, private: bool, exist_ok: bool) -> None:
        assert (repo_type, private, exist_ok) == ("dataset", True, True)
        (self.root / repo).mkdir(parents=True, exist_ok=True)

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, path_in_repo: str, **_: Any
    ) -> None:
        shutil.copytree(folder_path, self.root / repo_id / path_in_repo)

    def snapshot_download(self, repo: str, *, repo_type: str, allow_patterns: str) -> str:
        if not (self.root / repo).is_dir():
            answer: Any = SimpleNamespace(headers={}, request=None)
            raise RepositoryNotFoundError("no such repository", response=answer)
        return str(self.root / repo)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr(hub_cache, "HfApi", lambda: hub)
    monkeypatch.setattr(hub_cache, "snapshot_download", hub.snapshot_download)
    return hub


def test_what_one_machine_tokenised_another_finds(tmp_path: Path, hub: FolderHub) -> None:
    path = str(write_jsonl(tmp_path / "d.jsonl", make_pairs(20)))

    def load(machine: str) -> Any:
        cache = tmp_path / machine
        return load_pairs(path, tokenizer=tiny_tokenizer(), cache=cache, hub=HubCache())

    first, second = load("one"), load("two")
    assert (first.reused, second.reused) == (False, True)
    assert second.examples.fingerprint() == first.examples.fingerprint()
    [folder] = (hub.root / "ann" / hub_cache.REPOSITORY).iterdir()
    assert folder.name == next((tmp_path / "one").iterdir()).name
    # An upload that was cut off has no complete.json, and is no help.
    (folder / "complete.json").unlink()
    assert not HubCache().fetch(tmp_path / "three" / folder.name)


def test_nobody_logged_in(hub: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> dict[str, str]:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(hub, "whoami", nobody)
    with pytest.raises(CacheError, match="hf auth login"):
        HubCache()


def test_a_hub_that_refuses(
    tmp_path: Path, hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    path = str(write_jsonl(tmp_path / "d.jsonl", make_pairs(5)))
    cache = tmp_path / "cache"
    with pytest.raises(CacheError, match=r"ann/preftune-tokenized cannot be written \(no route"):
        load_pairs(path, tokenizer=tiny_tokenizer(), cache=cache, hub=HubCache())
    assert load_pairs(path, tokenizer=tiny_tokenizer(), cache=cache).reused
