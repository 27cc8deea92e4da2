"""Writing files so that a reader, or a run that goes on after a kill, never sees half of one."""

import fcntl
import os
import secrets
import shutil
import time
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


def remove_tree(path: Path, *, ignore_errors: bool = True) -> None:
    """Delete a folder, if only as far as that can be done; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=ignore_errors)


def hold_alone(folder: Path) -> int:
    """Lock a folder against other processes that ask for it; freed when this one ends.

    Returns:
        The descriptor that holds the lock.

    Raises:
        CheckpointError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    for patience in (0.1, 0.3, 0.6, None):  # a process that only looks holds it for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if patience is None:
                os.close(descriptor)
                raise _held(folder) from None
            time.sleep(patience)
        except OSError:
            break  # a file system without locks: nothing can be held there
    return descriptor


def refuse_if_held(folder: Path) -> None:
    """See that no other process holds a folder; holds nothing afterwards.

    Raises:
        CheckpointError: one does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Shared, so that ranks that look at once do not see each other.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(folder) from None
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _held(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"another process is working in {folder}; wait for it, or give another --output_dir"
    )
