"""Writing files so that a reader, or a run that goes on after a kill, never sees half of one."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preftune.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; afterwards it is flushed and takes `path`'s place.

    On an error nothing changes and what was written is removed.
    """
    # Random, because containers that share a cache often share process ids too.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one go, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def fsync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Delete a folder as far as that can be done; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def hold_alone(folder: Path) -> int:
    """Lock a folder against other processes that ask for it; freed when this one ends.

    Returns:
        The descriptor that holds the lock.

    Raises:
        CheckpointError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"another process is working in {folder}; wait for it, or give another --output_dir"
        ) from None
    except OSError:
        pass  # a file system without locks: nothing can be held there
    return descriptor
