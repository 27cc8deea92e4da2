"""Answers and verdicts that are kept as they come, so that an interrupted comparison goes on."""

import json
import os
from pathlib import Path
from typing import Any

import xxhash


class Kept:
    """Values by the content that they belong to, one JSON line each, appended."""

    def __init__(self, path: Path) -> None:
        """Read what is there; a last line that a kill cut off is removed."""
        self.path = path
        self._values: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            self._values[key] = value
            whole += len(line)
        if path.exists() and path.stat().st_size > whole:
            os.truncate(path, whole)

    def __contains__(self, key: str) -> bool:
        """Whether a value is known."""
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        """The value."""
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Keep a value; it is on disk afterwards."""
        line = json.dumps([key, value]) + "\n"
        with self.path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.write(line)
        self._values[key] = value


def digest(*parts: Any) -> str:
    """xxh3_128, in hex, of plain values."""
    text = json.dumps(parts, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())
