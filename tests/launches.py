"""Processes that work together, on the CPU: of torchrun and of `preftune launch`, for tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.runs import arguments, tiny_settings

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def torchrun(
    num_processes: int, *words: object, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run Python in several processes; none of them outlives this.

    Args:
        num_processes: how many.
        words: what Python gets in each of them.
        timeout: seconds.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    launch += ["--standalone", "--no-python", sys.executable]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*launch, *map(str, words)],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s: {err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_of(num_processes: int, *words: object) -> str:
    """What `torchrun` printed, which must end well."""
    result = torchrun(num_processes, *words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def start(
    command: Sequence[str], settings: dict[str, Any], before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """A command that trains, in a process group of its own.

    Args:
        command: words of a launcher, for Python.
        settings: of `preftune train`.
        before: what runs it.
    """
    return subprocess.Popen(
        [*before, sys.executable, *command, "train", *arguments(settings)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str]:
    """Its exit code and what it said."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, said


def launched(words: Sequence[str], settings: dict[str, Any]) -> tuple[int, str]:
    """The exit code of `preftune launch`, and what it said."""
    return finish(start(["-m", "preftune", "launch", *words, "--"], settings))


def settings_of(root: Path, name: str, **options: Any) -> dict[str, Any]:
    """Options of a run of its own under `root`, with a checkpoint a step."""
    common = {"gradient_accumulation_steps": 1, "checkpointing_steps": 1, "progress": "plain"}
    own = {"output_dir": root / name, "cache_dir": root / f"cache-{name}"}
    return tiny_settings(root, **common, **own, **options)


def weights(run: Path) -> bytes:
    """Of a finished run."""
    return (run / "final" / "model.safetensors").read_bytes()
