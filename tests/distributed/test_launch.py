"""`preftune launch` with whole runs: killed ranks, other numbers of processes, exit codes."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.launches import finish, launched, settings_of, start, torchrun, weights
from tests.runs import pretend_unfinished, read_metrics

pytestmark = pytest.mark.distributed

LAUNCHING = str(Path(__file__).with_name("launching.py"))
TWO = ("local", "--num_processes", "2")


@pytest.mark.slow
def test_ranks_killed_in_the_reference_pass_a_step_and_a_save(tmp_path):
    """Three kills in one run, which ends as the one that is left alone."""
    code, said = launched(TWO, settings_of(tmp_path, "unbroken"))
    assert code == 0, said
    marks = tmp_path / "marks"
    marks.mkdir()
    code, said = finish(start([LAUNCHING, str(marks), *TWO, "--"], settings_of(tmp_path, "killed")))
    assert code == 0, said
    starts = sorted(float(line) for line in (marks / "starts").read_text().splitlines())
    for name in ("reference", "step", "save"):
        killed = float((marks / name).read_text())
        # Until the processes that come after the others have ended are there.
        assert min(began for began in starts if began > killed) - killed < 60
    assert said.count("was killed by SIGKILL; ending the others") == 3
    assert "restart 3 of 3, from the last checkpoint" in said
    assert "preftune: error: rank 0 has lost rank 1 on " in said
    assert read_metrics(tmp_path / "killed") == read_metrics(tmp_path / "unbroken")
    assert weights(tmp_path / "killed") == weights(tmp_path / "unbroken")


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_steps(tmp_path):
    """What two processes began, one goes on with; to rounding, with pairs a step as they were."""
    settings = settings_of(tmp_path, "two", total_batch_size=8, keep_last_n_checkpoints=None)
    code, said = launched(TWO, settings)
    assert code == 0, said
    one = tmp_path / "one"
    shutil.copytree(tmp_path / "two", one)
    pretend_unfinished(one, 3)
    code, said = launched(("local", "--num_processes", "1"), settings | {"output_dir": str(one)})
    assert code == 0, said
    assert "going on after step 3" in said
    lines = zip(read_metrics(tmp_path / "two"), read_metrics(one), strict=True)
    for number, (expected, got) in enumerate(lines, 1):
        assert got == (expected if number <= 3 else pytest.approx(expected, rel=1e-4, abs=1e-5))
    assert weights(one) != weights(tmp_path / "two")  # nothing was copied


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_on_all_ranks(tmp_path):
    process = start(
        ["-m", "preftune", "launch", *TWO, "--"], settings_of(tmp_path, "run", num_epochs=300.0)
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75, said
    assert said.count("preftune: interrupted: SIGTERM received: stopped after step ") == 1
    assert "restart" not in said


HANG = """
import os, signal, time
from preftune.config.experiment import ExperimentConfig
from preftune.distributed.peers import lost_peer
from preftune.distributed.runtime import Runtime

config = ExperimentConfig(model_name_or_path="m", dataset_name="d", collective_timeout="10s")
runtime = Runtime("fp32", 0, config.collective_seconds)
if runtime.rank == 1:
    time.sleep(600)
began = time.monotonic()
try:
    runtime.gather(0)
except RuntimeError as error:
    print(f"after {time.monotonic() - began:.0f} s: {lost_peer(error)}", flush=True)
os.killpg(0, signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout():
    """Without a launcher of ours: the collective itself gives up, and names the other rank."""
    result = torchrun(2, "-c", HANG)
    assert re.search(r"after 1\d s: rank 0 has lost rank 1 on ", result.stdout), result.stderr
