"""Event files for TensorBoard."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto import event_pb2
from torch.utils.tensorboard import SummaryWriter

from preftune.tracking.tracker import Status, TrackedRun

_MESSAGES: Any = event_pb2  # made by protobuf while it is imported: of no type


class TensorBoardTracker:
    """Writes metrics as scalars, samples and settings as text.

    Behind each step lies an event that TensorBoard does not show: up to there the files are whole.
    """

    def __init__(self, run: TrackedRun) -> None:
        """Write into the run's folder; TensorBoard passes over what earlier files hold of a step
        that was under way when they ended."""
        folder = run.folder / "tensorboard"
        self.last_step = _last_whole_step(folder)
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1)
        if self.last_step < 0:
            settings = yaml.safe_dump(dict(run.facts), sort_keys=False, allow_unicode=True)
            self._writer.add_text("run", _as_code(settings), 0)

    def append(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Write one step through to the file."""
        for number, row in enumerate(samples):
            text = "\n\n".join(f"**{name}**\n\n{_as_code(str(row[name]))}" for name in row)
            self._writer.add_text(f"samples/{number}", text, step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        assert self._writer.file_writer is not None  # until it is closed
        self._writer.file_writer.add_event(_MESSAGES.Event(session_log=_whole()), step)
        self._writer.flush()

    def close(self, status: Status) -> None:
        """Close the file."""
        self._writer.close()


def _whole() -> Any:
    """TensorBoard's own note that something was saved, which it shows nowhere."""
    return _MESSAGES.SessionLog(status=_MESSAGES.SessionLog.CHECKPOINT)


def _last_whole_step(folder: Path) -> int:
    steps = [-1]
    for path in folder.glob("events.out.tfevents.*"):
        events: Any = EventFileLoader(str(path)).Load()
        steps += [event.step for event in events if event.session_log == _whole()]
    return max(steps)


def _as_code(text: str) -> str:
    # Indented: what a model writes may hold any other mark of Markdown.
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
