"""Live progress of long stages: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from textwrap import TextWrapper
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from preftune.config.logging import Progress as ProgressStyle
from preftune.redaction import redacted

SECONDS_BETWEEN_LINES = 10.0
WIDE = 120
"""Columns of a terminal beyond which a bar grows no more."""


class Update(Protocol):
    """Reports a stage's progress."""

    def __call__(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Say how much is done, with a few values to show."""
        ...


class ProgressDisplay:
    """Shows one stage at a time, on standard error, on the main process only."""

    def __init__(
        self, style: ProgressStyle, *, is_main: bool = True, console: Console | None = None
    ) -> None:
        """Choose how to show progress; `auto` is `rich` on a terminal and `plain` elsewhere."""
        self._console = console or Console(stderr=True)
        if style == "auto":
            style = "rich" if self._console.is_terminal else "plain"
        self._style: ProgressStyle = style if is_main else "none"
        self._live: _LiveView | None = None

    def say(self, text: str) -> None:
        """Print one line, kept apart from a live bar."""
        if self._style == "none":
            return
        text = redacted(text)
        if self._console.is_terminal:
            # Lines break between words; a word too long for one, such as a path, is left to the
            # terminal, from which it can be copied whole.
            fit = TextWrapper(self._console.width, break_long_words=False, break_on_hyphens=False)
            text = "\n".join(map(fit.fill, text.splitlines()))
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

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
        is_inside = self._live is not None
        # rich allows one live view at a time, so a stage inside another is a line of its view.
        with self._live_view() as live:
            pace = _Pace(unit, total, start)
            count = "" if total is None else _count(start, total)
            task = live.add_task(name, total=total, completed=start, count=count, pace="")

            def update(done: int, values: Mapping[str, float] | None = None) -> None:
                live.update(task, completed=done, count=_count(done, total), pace=pace.at(done))
                if values:
                    live.values = _shown(values)

            yield update
            if is_inside:
                live.remove_task(task)

    @contextmanager
    def _live_view(self) -> Iterator["_LiveView"]:
        if self._live is not None:
            yield self._live
            return
        self._live = _LiveView(self._console)
        try:
            with self._live, _logs_beside(self._console):
                yield self._live
        finally:
            self._live = None

    def _plain_stage(self, name: str, total: int | None, unit: str, start: int) -> Update:
        pace = _Pace(unit, total, start)
        # A stage of known size shows at once; one of unknown size only if it takes long.
        printed = time.monotonic() - (0.0 if total is None else SECONDS_BETWEEN_LINES)
        shown, is_over = "", False

        def update(done: int, values: Mapping[str, float] | None = None) -> None:
            nonlocal printed, shown, is_over
            now = time.monotonic()
            shown = _shown(values) or shown
            if is_over or (done != total and now - printed < SECONDS_BETWEEN_LINES):
                return
            printed, is_over = now, done == total
            text = f"{name}: {_count(done, total)}  {pace.at(done)}  {shown}"
            print(text.rstrip(), file=sys.stderr, flush=True)

        return update


def counting(update: Update) -> Callable[[int, int | None], None]:
    """An `Update` as the (done, total) callback that the lower layers take."""
    return lambda done, total: update(done)


class _LiveView(Progress):
    """Lines of stages, as wide as the terminal, and below them the values last heard of."""

    def __init__(self, console: Console) -> None:
        self.values = ""
        # A stage's name may be a file's: the bar and the numbers stay readable beside it.
        name = Column(max_width=console.width // 4, no_wrap=True, overflow="ellipsis")
        as_it_is = Column(no_wrap=True)
        is_wide = console.width > WIDE
        super().__init__(
            TextColumn("{task.description}", table_column=name, markup=False),
            BarColumn(WIDE // 2 if is_wide else None, table_column=Column(ratio=1, min_width=8)),
            TextColumn("{task.fields[count]}", table_column=as_it_is),
            TextColumn("{task.fields[pace]}", table_column=as_it_is),
            console=console,
            expand=not is_wide,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The stages' lines, and the values."""
        yield from super().get_renderables()
        if self.values:
            yield Text(f"  {self.values}", no_wrap=True, overflow="ellipsis")


@contextmanager
def _logs_beside(console: Console) -> Iterator[None]:
    """Have what libraries log printed above a live view rather than across it.

    rich does so with whatever is written to `sys.stderr` by that name; handlers hold the stream
    that it stood for when they were made.
    """
    if not console.is_terminal:
        yield
        return
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    handlers: list[Any] = [handler for logger in loggers for handler in logger.handlers]
    moved = [
        (handler, handler.setStream(sys.stderr))
        for handler in handlers
        if getattr(handler, "stream", None) in (sys.__stderr__, sys.__stdout__)
    ]
    try:
        yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)


class _Pace:
    """How fast a stage is, and how long it takes yet."""

    def __init__(self, unit: str, total: int | None, start: int) -> None:
        self._unit, self._total, self._start = unit, total, start
        self._began = time.monotonic()

    def at(self, done: int) -> str:
        """In words, when so much is done."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (done - self._start) / seconds
        text = f"{rate:.2f} {self._unit}/s"
        if self._total is None or rate == 0:
            return text
        if done >= self._total:
            return f"{text}  {_duration(seconds)}"
        return f"{text}  {_duration((self._total - done) / rate)} left"


def _count(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done}/{total}"


def _shown(values: Mapping[str, float] | None) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in (values or {}).items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
