"""Turn SIGTERM and SIGINT into a request that the loop answers between two steps."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked the run to save and stop."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.signal_name: str | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT while the loop runs; a second one ends the process at once.

    Outside the main thread, where Python cannot catch signals, nothing is caught.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal_name is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal_name = signal.Signals(number).name

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
