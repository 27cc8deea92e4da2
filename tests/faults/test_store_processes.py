"""Several processes on one store of reference log-probs, and kills at random instants."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("store_processes.py")
ROOT = Path(__file__).resolve().parents[2]
SEED = 0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `store_processes.py` says."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("stores")), str(SEED)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shards(store: dict[str, str]) -> dict[str, str]:
    return {name: content for name, content in store.items() if name.endswith(".safetensors")}


def test_two_processes_share_the_shards_and_compute_none_twice(outcome):
    straight = shards(outcome["stores"]["straight"])
    assert (outcome["answers"], len(straight) > 20) == (120, True)
    for computed in outcome["together"]:
        assert sum(computed) == outcome["answers"]
    # The work is divided, not queued behind one of them.
    assert max(min(computed) for computed in outcome["together"]) > 30


def test_a_shard_whose_process_died_is_computed_by_the_one_that_waited(outcome):
    waited, killed, computed = outcome["held"]
    assert (waited, killed) == (1, -9)
    assert 0 < computed < outcome["answers"]


def test_killed_and_shared_passes_end_in_the_bytes_of_an_unbroken_one(outcome):
    straight = outcome["stores"].pop("straight")
    assert len(outcome["stores"]) == 7
    assert sum(outcome["kills"]) >= 6  # the others ended before they were killed
    for name, store in outcome["stores"].items():
        assert sorted(store) == sorted(straight), name
        assert [file for file in store if store[file] != straight[file]] == [], name
