"""The benchmark against TRL as a command, on a tiny random model: equal numbers, then arms."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install '.[peers]'"),
]


def run(output: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`benchmarks/against_trl.py` on pairs of random words."""
    command = [sys.executable, str(ROOT / "benchmarks" / "against_trl.py")]
    command += ["--model", "random-tiny", "--datasets", "random:20x12", "--batch", "4"]
    command += ["--threads", "1", "--output", str(output), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_gates_pass_and_every_arm_is_measured(tmp_path):
    arms = ["trl_tuned", "trl_patched", "preftune"]
    words = ("--gate-steps", "3", "--steps", "2", "--repeats", "1", "--arms", *arms)
    done = run(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    (setting,) = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert setting["gate"]["largest"]["losses"] < 1e-5
    losses = [loss for side in setting["gate"]["sides"].values() for loss in side["losses"]]
    # Otherwise policy and reference were the same, and the gate could not see what was scored.
    assert max(abs(loss - 0.6931) for loss in losses) > 1e-3
    assert {run["arm"] for run in setting["runs"] if "error" not in run} == set(arms)
    assert all(len(run["cpu"]) == 3 for run in setting["runs"])
    counted = setting["pairs"]["random"]["batches"]
    shared = sum(sum(pair[:3]) for batch in counted for pair in batch)
    (ours,) = (run for run in setting["runs"] if run["arm"] == "preftune")
    assert ours["num_tokens"] == shared
    assert "`trl_patched`" in (tmp_path / "results.md").read_text()

    again = run(tmp_path, *words)
    assert again.returncode == 1
    assert "give --resume or another --output" in again.stderr
    resumed = run(tmp_path, *words, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "took 0.0 min" in resumed.stderr  # nothing was measured twice
