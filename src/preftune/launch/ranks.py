"""The processes of one host: started, watched, ended in bounded time."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, Interrupted, PeerLost, TrainingDiverged
from preftune.launch.environment import ERROR_FILE, Place, inherited, rank_environment
from preftune.launch.program import Program

FINAL = (ConfigError.exit_code, TrainingDiverged.exit_code, Interrupted.exit_code)
"""Exit codes of a rank after which nothing is started again."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """How a process ended that did not finish."""

    rank: int
    host: str
    """Empty where there is only one."""
    code: int
    """Its exit code; negative: the signal that killed it."""
    text: str = ""
    """What it says itself."""
    kind: str = ""
    """The class of its error."""
    ended: bool = False
    """Whether the launcher had told it to end."""

    @property
    def is_final(self) -> bool:
        """Whether it would end so again, or means to end the run."""
        return self.code in FINAL

    @property
    def is_consequence(self) -> bool:
        """Whether it may well follow from how another one ended."""
        return self.ended or self.kind == PeerLost.__name__

    @property
    def who(self) -> str:
        """In words."""
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    @property
    def how(self) -> str:
        """In words."""
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


class Ranks:
    """The processes of this host, each in a process group of its own."""

    def __init__(
        self,
        program: Program,
        num_processes: int,
        place: Place,
        host: str,
        end_seconds: float,
    ) -> None:
        """Start them.

        Args:
            program: what they run.
            num_processes: how many.
            place: among those of all hosts.
            host: what messages call this one.
            end_seconds: how long `end` lets them end by themselves.
        """
        self.place = place
        self._host = host
        self._end_seconds = end_seconds
        self._ending_since: float | None = None
        self._told_to_end = False
        self._errors = Path(tempfile.mkdtemp(prefix="preftune-launch-"))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for local_rank in range(num_processes):
                self._start(program, local_rank, num_processes)
        except BaseException:
            self.kill()
            raise

    @property
    def running(self) -> bool:
        """Whether any of them has not ended."""
        return bool(self._running)

    @property
    def pids(self) -> dict[int, int]:
        """Process id of each rank that is running."""
        return {rank: process.pid for rank, process in self._running.items()}

    def poll(self) -> list[Failure]:
        """Those that failed since the last call; ends the others where the time is up."""
        failures = []
        for rank, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[rank]
            _signal_group(process.pid, signal.SIGKILL)  # what it started itself
            if code:
                failures.append(self._failure(rank, code))
        self._hurry()
        if not self._running:
            shutil.rmtree(self._errors, ignore_errors=True)
        return failures

    def signal(self, number: int) -> None:
        """Pass a signal on to each."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self) -> None:
        """Let them end, within `end_seconds`; `poll` sees to it."""
        if self._ending_since is None:
            self._ending_since = time.monotonic()

    def kill(self) -> None:
        """End them at once, and wait for that."""
        for process in self._running.values():
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()
        shutil.rmtree(self._errors, ignore_errors=True)

    def _start(self, program: Program, local_rank: int, num_processes: int) -> None:
        own = rank_environment(self.place, local_rank, num_processes)
        rank = self.place.first_rank + local_rank
        self._running[rank] = subprocess.Popen(
            program.command,
            env=inherited() | own | {ERROR_FILE: str(self._errors / str(rank))},
            stdin=subprocess.DEVNULL,
            # Apart from the terminal's group: a Ctrl-C reaches each once, through the launcher.
            process_group=0,
            preexec_fn=_die_with_parent(),
        )

    def _failure(self, rank: int, code: int) -> Failure:
        said: dict[str, str] = {}
        with suppress(OSError, ValueError):
            said = json.loads((self._errors / str(rank)).read_text(encoding="utf-8"))
        text, kind = said.get("text", ""), said.get("kind", "")
        return Failure(rank, self._host, code, text, kind, self._told_to_end)

    def _hurry(self) -> None:
        if self._ending_since is None or not self._running:
            return
        waited = time.monotonic() - self._ending_since
        if waited > self._end_seconds:
            self._told_to_end = True
            for process in self._running.values():
                _signal_group(process.pid, signal.SIGKILL)
        elif waited > self._end_seconds / 6 and not self._told_to_end:
            # One that is still loading ends at once; one that trains, when its step fails.
            self._told_to_end = True
            self.signal(signal.SIGTERM)


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does first: ask for SIGTERM when the launcher is killed. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up here: a child may do little before it runs

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask
