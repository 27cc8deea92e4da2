"""Turn signals into requests that the loop answers between two steps."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAME_SECONDS = 2.0
"""Signals so close together are one: Slurm gives one to the launcher, which passes it on, and to
each of its processes."""


class SignalRequests:
    """What signals have asked of the run."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.stop: str | None = None
        """Name of the signal that asks to save and stop."""
        self._save = False
        self._asked_at = 0.0

    def take_save(self) -> bool:
        """Whether a signal asks to save and go on; asks once."""
        asked, self._save = self._save, False
        return asked

    @contextmanager
    def saving(self) -> Iterator["SignalRequests"]:
        """Catch SIGUSR1, which else would end the process: save at the end of the next step."""

        def handle(number: int, frame: FrameType | None) -> None:
            self._save = True

        with _caught({signal.SIGUSR1: handle}):
            yield self

    @contextmanager
    def stopping(self) -> Iterator["SignalRequests"]:
        """Catch SIGTERM and SIGINT: save and stop; a later one ends the process at once."""

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop is not None:
                if time.monotonic() - self._asked_at < SAME_SECONDS:
                    return
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.stop = signal.Signals(number).name
            self._asked_at = time.monotonic()

        with _caught({signal.SIGTERM: handle, signal.SIGINT: handle}):
            yield self


@contextmanager
def _caught(handlers: dict[int, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Outside the main thread, where Python cannot catch signals, nothing is caught."""
    before = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
