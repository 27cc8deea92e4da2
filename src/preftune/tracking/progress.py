"""Live progress of long stages: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from preftune.config.logging import Progress as ProgressStyle
from preftune.redaction import redacted

SECONDS_BETWEEN_LINES = 10.0


class Update(Protocol):
    """Reports a stage's progress."""

    def __call__(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Say how much is done, with a few values to show."""
        ...


class ProgressDisplay:
    """Shows one stage at a time, on standard error, on the main process only."""

    def __init__(self, style: ProgressStyle, *, is_main: bool = True) -> None:
        """Choose how to show progress; `auto` is `rich` on a terminal and `plain` elsewhere."""
        self._console = Console(stderr=True)
        if style == "auto":
            style = "rich" if self._console.is_terminal else "plain"
        self._style: ProgressStyle = style if is_main else "none"
        self._live: Progress | None = None
        self._depth = 0

    def say(self, text: str) -> None:
        """Print one line, kept apart from a live bar."""
        if self._style != "none":
            self._console.print(redacted(text), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str, start: int = 0) -> Iterator[Update]:
        """Show a stage of `total` things (None: unknown), of which `start` were done earlier."""
        if self._style == "rich":
            with self._rich_stage(name, total, unit, start) as update:
                yield update
        elif self._style == "plain":
            yield self._plain_stage(name, total, unit, start)
        else:
            yield lambda done, values=None: None

    @contextmanager
    def _rich_stage(self, name: str, total: int | None, unit: str, start: int) -> Iterator[Update]:
        # rich allows one live view at a time, so a stage inside another is a line of its view.
        with self._live_view() as live:
            task = live.add_task(name, total=total, completed=start, rate="", shown="")
            began = time.monotonic()

            def update(done: int, values: Mapping[str, float] | None = None) -> None:
                rate = (done - start) / max(time.monotonic() - began, 1e-9)
                live.update(task, completed=done, rate=_rate(rate, unit))
                if values:
                    live.update(task, shown=_shown(values))

            yield update
            if self._depth > 1:
                live.remove_task(task)

    @contextmanager
    def _live_view(self) -> Iterator[Progress]:
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
                console=self._console,
            )
            self._live.start()
        self._depth += 1
        try:
            yield self._live
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._live.stop()
                self._live = None

    def _plain_stage(self, name: str, total: int | None, unit: str, start: int) -> Update:
        began = time.monotonic()
        # A stage of known size shows at once; one of unknown size only if it takes long.
        printed = [began if total is None else began - SECONDS_BETWEEN_LINES]

        def update(done: int, values: Mapping[str, float] | None = None) -> None:
            now = time.monotonic()
            if done != total and now - printed[0] < SECONDS_BETWEEN_LINES:
                return
            printed[0] = now
            rate = (done - start) / max(now - began, 1e-9)
            text = f"{name}: {done}"
            if total is not None:
                text += f"/{total}"
            text += f"  {_rate(rate, unit)}"
            if total is not None and rate > 0:
                text += f"  {_duration((total - done) / rate)} left"
            print(
                f"{text}  {_shown(values)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

        return update


def counting(update: Update) -> Callable[[int, int | None], None]:
    """An `Update` as the (done, total) callback that the lower layers take."""
    return lambda done, total: update(done)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.2f} {unit}/s"


def _shown(values: Mapping[str, float] | None) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in (values or {}).items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
