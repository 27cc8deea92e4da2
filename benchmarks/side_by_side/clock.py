"""Marks of time and memory, taken alike on both sides."""

import resource
import time
from typing import Any

import torch


class Clock:
    """Wall time, process CPU time and peak memory at each step of a training run."""

    def __init__(self, warmup: int, steps: int) -> None:
        """Wait for a GPU only at the borders of what is timed: to wait each step would cost time.

        Args:
            warmup: of the steps, the first that are not timed.
            steps: of the whole run.
        """
        self._synced = {0, 1, warmup, steps}
        self._wall: list[float] = []
        self._cpu: list[float] = []
        self._peak = 0.0

    def mark(self) -> None:
        """Take the time: before the first step, and after each."""
        if torch.cuda.is_available() and len(self._wall) in self._synced:
            torch.cuda.synchronize()
        self._wall.append(time.perf_counter())
        self._cpu.append(time.process_time())
        self._peak = peak_mib()

    def result(self) -> dict[str, Any]:
        """Seconds of each step; peak memory up to the last, MiB."""
        return {
            "wall": [b - a for a, b in zip(self._wall, self._wall[1:], strict=False)],
            "cpu": [b - a for a, b in zip(self._cpu, self._cpu[1:], strict=False)],
            "peak_mib": self._peak,
        }


class Timer:
    """Seconds spent inside a `with`."""

    def __enter__(self) -> "Timer":
        """Start."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu


def peak_mib() -> float:
    """Most memory so far: allocated on a GPU, resident of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
