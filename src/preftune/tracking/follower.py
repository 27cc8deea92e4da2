"""Brings `metrics.jsonl` and `samples.jsonl` to a tracker, beside the training.

A tracker is a follower of these two files: it reads them on a thread of its own, takes each step
that its store does not have yet, and tries again where it failed. So a server that cannot be
reached costs no step, and one that can be reached again, or a run that goes on after a kill, gets
what is lacking, once.
"""

import heapq
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from preftune.redaction import redacted_values
from preftune.tracking.tracker import Status, TrackedRun, Tracker

FIRST_PAUSE = 5.0
"""Seconds until a tracker that failed is tried again; each further time twice as long."""
LONGEST_PAUSE = 1800.0
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its trackers, all of them together."""
SHOWN_CHARACTERS = 300


class Followers:
    """The trackers of a run."""

    def __init__(
        self,
        openers: Mapping[str, Callable[[TrackedRun], Tracker]],
        run: TrackedRun,
        files: Sequence[Path],
        say: Callable[[str], None],
    ) -> None:
        """Begin to bring each what it lacks.

        Args:
            openers: what takes up a run in a store, by the tracker's name.
            run: the run.
            files: of objects with `step`, one a line, in order of steps: metrics, samples.
            say: tells people a sentence.
        """
        self._say = say
        self._followers = [Follower(name, openers[name], run, files, say) for name in openers]

    def wake(self) -> None:
        """Note that the files hold all there is of the steps so far."""
        for follower in self._followers:
            follower.wake()

    def close(self, status: Status) -> None:
        """Let them take the rest, and end; waits `CLOSE_SECONDS` at most."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for follower in self._followers:
            follower.finish(status)
        for follower in self._followers:
            follower.join(deadline)
            if not follower.is_done:
                since = f"after step {follower.taken}" if follower.taken >= 0 else "of every step"
                self._say(
                    f"{follower.name} did not get the metrics {since}; they are in metrics.jsonl "
                    "(docs/tracking.md says how to hand them over)"
                )
        self._followers = []


class Follower:
    """One tracker, on a thread of its own."""

    def __init__(
        self,
        name: str,
        opener: Callable[[TrackedRun], Tracker],
        run: TrackedRun,
        files: Sequence[Path],
        say: Callable[[str], None],
    ) -> None:
        """Start the thread; see `Followers`."""
        self.name = name
        self.taken = -1
        """The last step that the tracker has taken."""
        self.is_done = False
        """Whether it has taken everything, and is closed."""
        self._opener = opener
        self._tracked = run
        self._files = files
        self._say = say
        self._sizes = self._sizes_now()
        self._status: Status | None = None
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._failures = 0
        self._is_left = False
        # A daemon: what hangs in a library must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"preftune-{name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Note that the files hold all there is of the steps so far."""
        self._sizes = self._sizes_now()
        self._woken.set()

    def finish(self, status: Status) -> None:
        """Ask for the rest, and for the end."""
        self._status = status
        self._closing.set()
        self._woken.set()

    def join(self, deadline: float) -> None:
        """Wait for the end until `deadline`, by `time.monotonic`; then it is left alone."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._is_left = True

    def _sizes_now(self) -> list[int]:
        return [path.stat().st_size if path.exists() else 0 for path in self._files]

    def _run(self) -> None:
        while True:
            is_last = self._closing.is_set()
            try:
                self._follow()
                self.is_done = True
                return
            except Exception as error:  # whatever a library raises, training goes on
                if self._is_left:
                    return
                self._tell(error)
            if is_last:
                return
            self._closing.wait(min(FIRST_PAUSE * 2 ** (self._failures - 1), LONGEST_PAUSE))

    def _follow(self) -> None:
        """Bring the tracker step after step, until the end."""
        tracker = self._opener(self._tracked)
        try:
            self.taken = tracker.last_step
            done = [0] * len(self._files)
            while True:
                self._woken.clear()
                status, sizes = self._status, self._sizes
                for step, metrics, samples in _by_step(self._files, done, sizes):
                    if step > self.taken:
                        tracker.append(step, metrics, samples)
                        self.taken = step
                        self._note_success()
                done = sizes
                if status is not None:
                    break
                self._woken.wait()
        except Exception:
            with suppress(Exception):  # the first error is what is told
                tracker.close("failed")
            raise
        tracker.close(status)

    def _tell(self, error: Exception) -> None:
        self._failures += 1
        if self._failures > 1:
            return
        text = " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN_CHARACTERS]
        self._say(
            f"warning: {self.name} does not take metrics ({text}); training goes on, metrics.jsonl "
            f"has them all, and {self.name} is tried again now and then"
        )

    def _note_success(self) -> None:
        if self._failures:
            self._say(f"{self.name} takes metrics again")
            self._failures = 0


def _by_step(
    files: Sequence[Path], start: Sequence[int], end: Sequence[int]
) -> Iterator[tuple[int, dict[str, float], list[dict[str, Any]]]]:
    """Step, metrics and samples between offsets of the two files, in order of steps."""
    rows = [
        _rows(path, kind, *span)
        for kind, (path, *span) in enumerate(zip(files, start, end, strict=True))
    ]
    for step, group in groupby(heapq.merge(*rows, key=itemgetter(0, 1)), key=itemgetter(0)):
        metrics: dict[str, float] = {}
        samples = []
        for _, kind, row in group:
            if kind == 0:
                metrics |= row
            else:
                samples.append(redacted_values(_flat(row)))
        names = dict.fromkeys(name for row in samples for name in row)
        yield step, metrics, [{name: row.get(name) for name in names} for row in samples]


def _rows(path: Path, kind: int, start: int, end: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    if start >= end:
        return
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < end:
            row = json.loads(file.readline())
            yield row.pop("step"), kind, row


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row of a table: what is nested gets names with slashes, and lists become text."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat
