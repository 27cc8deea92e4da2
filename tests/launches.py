"""Commands of `preftune launch` with whole runs, for tests."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.runs import arguments, tiny_settings

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


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
        [*before, sys.executable, *command, "--", "train", *arguments(settings)],
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
    return finish(start(["-m", "preftune", "launch", *words], settings))


def settings_of(root: Path, name: str, **options: Any) -> dict[str, Any]:
    """Options of a run of its own under `root`, with a checkpoint a step."""
    common = {"gradient_accumulation_steps": 1, "checkpointing_steps": 1, "progress": "plain"}
    own = {"output_dir": root / name, "cache_dir": root / f"cache-{name}"}
    return tiny_settings(root, **common, **own, **options)


def weights(run: Path) -> bytes:
    """Of a finished run."""
    return (run / "final" / "model.safetensors").read_bytes()
