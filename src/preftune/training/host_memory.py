"""How much memory of the host is free, as far as Linux says."""

import re
from pathlib import Path

_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Control groups, version 2 and 1: limit, use, and the part of the use that can be dropped."""


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, in its container if it has one; None if unknown.

    Args:
        root: of the file system that the kernel shows itself in.
    """
    known = [_of_machine(root), *(_of_group(root, *names) for names in _LIMITS)]
    return min((value for value in known if value is not None), default=None)


def _of_machine(root: Path) -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _of_group(root: Path, limit: str, use: str, droppable: str) -> int | None:
    folder = root / "sys/fs/cgroup"
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / use).read_text())
        dropped = re.search(
            rf"^{droppable} (\d+)$",
            (folder / limit).with_name("memory.stat").read_text(),
            re.MULTILINE,
        )
    except (OSError, ValueError):
        return None
    if allowed == "max":
        return None
    return int(allowed) - used + (int(dropped[1]) if dropped else 0)
