"""The store on a disk that is full or read-only: told with exit 2, and finished shards are kept."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from preftune import ExperimentConfig
from preftune.recipes.cache import build
from tests.mounts import IN_A_NAMESPACE, can_mount
from tests.runs import arguments, tiny_settings
from tests.tiny import make_pairs, write_jsonl

# On a file system of 400 KiB, where one shard of two fits; then read-only; then large enough.
SCRIPT = """
import subprocess, sys
from pathlib import Path
from preftune.cli.main import main

cache, words = sys.argv[1], sys.argv[2:]

def build():
    print("exit", main(["cache", "build", *words]))
    for path in sorted(Path(cache).glob("reference/*/*.safetensors")):
        print("shard", path.name, path.read_bytes().hex())

def mount(*options):
    subprocess.run([*options, cache], check=True)

mount("mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs")
build()
mount("mount", "--bind", cache)
mount("mount", "-o", "remount,bind,ro")
build()
mount("umount")
build()
mount("mount", "-o", "remount,size=20m")
build()
"""


def settings_of(root: Path) -> dict[str, Any]:
    """A run whose reference takes two shards."""
    settings = tiny_settings(root, dataset_cache_mode="off")
    answers = (80, 120)
    rows = make_pairs(260, completion_words=answers, prompt_words=(1, 3))
    write_jsonl(root / "pairs.jsonl", rows)
    return settings


@pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")
def test_a_full_and_a_read_only_disk_keep_finished_shards(tmp_path):
    settings = settings_of(tmp_path)
    build(ExperimentConfig(**settings | {"cache_dir": str(tmp_path / "straight")}))
    straight = {
        path.name: path.read_bytes().hex()
        for path in (tmp_path / "straight").glob("reference/*/*.safetensors")
    }
    (tmp_path / "cache").mkdir()
    command = [*IN_A_NAMESPACE, sys.executable, "-c", SCRIPT, str(tmp_path / "cache")]
    result = subprocess.run(
        [*command, *arguments(settings)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    exits, shards = [], []
    for line in result.stdout.splitlines():
        word, *rest = line.split()
        if word == "exit":
            exits.append(int(rest[0]))
            shards.append({})
        elif word == "shard":
            shards[-1][rest[0]] = rest[1]
    assert exits == [2, 2, 2, 0]
    # The first shard stays as it is all the while; in the end the bytes are those of one pass.
    assert [len(found) for found in shards] == [1, 1, 1, len(straight)] == [1, 1, 1, 2]
    assert all(found.items() <= straight.items() for found in shards)
    full, read_only, full_again = result.stderr.split("preftune: error: ")[1:]
    for said in (full, full_again):
        assert said.startswith(f"cannot write reference log-probs to {tmp_path / 'cache'}")
        assert "No space left on device" in said
        assert "finished shards are kept" in said
    assert "is not writable; give another --cache_dir" in read_only


@pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")
def test_a_disk_that_turns_read_only_in_the_middle_is_told(tmp_path):
    script = """
import subprocess, sys
from pathlib import Path
from preftune.errors import CacheError
from preftune.reference.store import ReferenceStore

cache = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", cache], check=True)
store = ReferenceStore(Path(cache), "ns", {})
store.write_plan("p", [b"k" * 16])
# Its lock is open for writing, so that only a second mount of the folder can be read-only.
subprocess.run(["mount", "--bind", cache, cache], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)

def claim():
    with store.claim(store.shard_path("p", 0)):
        raise AssertionError

def decide():
    with store.deciding():
        raise AssertionError

for work in (
    claim,
    decide,
    lambda: store.write_plan("q", []),
    lambda: ReferenceStore(Path(cache), "ns", {}),
    lambda: ReferenceStore(Path(cache), "other", {}),
):
    try:
        work()
    except CacheError as error:
        print(error)
print(store.read_plan("p") == [b"k" * 16])
"""
    command = [*IN_A_NAMESPACE, sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    *errors, plan = result.stdout.splitlines()
    assert len(errors) == 5
    for said in errors:
        assert "cannot write reference log-probs to" in said
        assert "Read-only file system" in said
        assert "--cache_dir" in said
    assert plan == "True"
