"""What a run spends on looking at its policy."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Costs:
    """Seconds by kind of work, summed over all commands of a run."""

    def __init__(self) -> None:
        """Nothing was spent yet."""
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Count the seconds of the block as spent on `kind`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(kind, time.perf_counter() - began)

    def take_up(self, earlier: Mapping[str, Mapping[str, float]]) -> None:
        """Add what earlier commands have spent, as `as_dict` gave it."""
        for kind, spent in earlier.items():
            self._add(kind, spent["seconds"])

    def as_dict(self, run_seconds: float) -> dict[str, dict[str, Any]]:
        """Seconds, and what part of the run's they are, by kind."""
        return {
            kind: {"seconds": round(seconds, 3), "share": round(seconds / run_seconds, 4)}
            for kind, seconds in self._seconds.items()
        }

    def describe(self, run_seconds: float) -> str:
        """The same as a sentence; empty where nothing was spent."""
        parts = [
            f"{kind} {seconds:.1f} s ({seconds / run_seconds:.1%})"
            for kind, seconds in self._seconds.items()
        ]
        return f"{', '.join(parts)} of the run's {run_seconds:.1f} s" if parts else ""

    def _add(self, kind: str, seconds: float) -> None:
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
