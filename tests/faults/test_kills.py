"""A few of the kills that `make soak` makes by the dozen."""

import subprocess
import sys


def test_killed_runs_end_as_the_unbroken_one():
    command = [sys.executable, "-m", "tests.faults.soak", "--kills", "3", "--seed", "1"]
    # A process of its own, which can fork: this one has run models and has threads.
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "kills survived  3 (" in result.stdout
    assert "each the same as the unbroken run" in result.stdout
