"""`metrics.jsonl` and the like: one object a line, none twice and none missing across resumes."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends lines and knows its length, so that a checkpoint can say where it stood."""

    def __init__(self, path: Path) -> None:
        """Use `path`, which need not exist yet."""
        self.path = path

    @property
    def offset(self) -> int:
        """Length in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, offset: int) -> None:
        """Drop what was logged after a checkpoint: those steps are trained again."""
        with self.path.open("ab") as file:
            file.truncate(offset)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system."""
        line = json.dumps(record) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())

    def close(self) -> None:
        """Nothing is held open between lines."""

    def sync(self) -> None:
        """Make the lines survive a power cut."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
