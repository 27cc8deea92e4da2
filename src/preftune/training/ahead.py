"""The next step's data is made while this step runs."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over `make(start) ... make(stop - 1)`, each made on a thread one step early.

    Example:
        >>> with Ahead(lay_out, 0, num_steps) as batches:
        ...     for batch in batches:
        ...         train(batch)
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int) -> None:
        """Make nothing yet.

        Args:
            make: the value of a step; it must not touch the device.
            start: the first step.
            stop: the step after the last one.
        """
        self._make = make
        self._steps = range(start, stop)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="preftune-data")

    def __iter__(self) -> Iterator[T]:
        """The values in order; what `make` raises is raised here, at its step."""
        if not self._steps:
            return
        coming = self._thread.submit(self._make, self._steps[0])
        for step in self._steps[1:]:
            made = coming.result()
            coming = self._thread.submit(self._make, step)
            yield made
        yield coming.result()

    def __enter__(self) -> "Ahead[T]":
        """The thread ends with the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for what is being made, and drop it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
