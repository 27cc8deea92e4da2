"""The namespaces of the reference store, as `preftune cache` shows, removes and finds them."""

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from preftune.errors import ConfigError
from preftune.files import remove_tree
from preftune.reference.store import LOCK, STORE_VERSION, shards_in

_REMOVED = ".removed-"


@dataclass(frozen=True)
class Namespace:
    """Stored values of one model in one form of numerics."""

    folder: Path
    fields: dict[str, Any]
    """Of namespace.json; empty if that cannot be read."""
    num_answers: int
    num_bytes: int
    last_used: float
    """Seconds since 1970."""
    unreadable: list[Path] = field(default_factory=list)
    """Shards whose header cannot be read. `cache verify` reads all of them."""

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.name

    @property
    def is_current(self) -> bool:
        """Whether this version of preftune can read it."""
        return self.fields.get("store_version") == STORE_VERSION

    @property
    def days(self) -> float:
        """Since a run used it last; negative if the clock was set back since."""
        return (time.time() - self.last_used) / 86400

    def described(self) -> str:
        """A line for people."""
        fields = self.fields
        config = fields.get("model_config") or {}
        model = fields.get("model") or config.get("model_type") or "of an unknown model"
        numerics = [str(fields.get(key, "?")) for key in ("dtype", "precision", "layout", "device")]
        text = (
            f"{self.name}  {model} (weights {str(fields.get('weights', '?'))[:12]}), "
            f"{', '.join(numerics)}: {self.num_answers} answers, {mib(self.num_bytes)}, "
            f"last used {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.last_used))}"
        )
        if not self.is_current:
            text += "; of another version of preftune, which no run of this one reads"
        if self.unreadable:
            text += f"; {len(self.unreadable)} damaged: {', '.join(map(str, self.unreadable))}"
        return text


def mib(num_bytes: int) -> str:
    """A size for people."""
    return f"{num_bytes / 2**20:.2f} MiB"


def find_namespaces(cache_dir: Path) -> list[Namespace]:
    """All that lie there, the latest used first; reads no values."""
    root = cache_dir / "reference"
    folders = [path for path in root.iterdir() if _is_namespace(path)] if root.is_dir() else []
    return sorted(map(_look_at, folders), key=lambda found: -found.last_used)


def one_namespace(found: list[Namespace], prefix: str) -> Namespace:
    """The namespace that a user means.

    Args:
        found: what there is.
        prefix: its name, or the first letters of it; empty for the only one.

    Raises:
        ConfigError: none is meant, or several are.
    """
    meant = [namespace for namespace in found if namespace.name.startswith(prefix)]
    if len(meant) == 1:
        return meant[0]
    names = ", ".join(namespace.name for namespace in meant or found) or "none"
    said = f"namespace is {prefix!r}" if prefix else "namespace is not set"
    which = "which several names begin with" if meant else "which no name begins with"
    why = which if prefix else f"and there are {len(found)}"
    raise ConfigError(f"{said}, {why}; they are: {names}")


def remove_namespace(namespace: Namespace) -> str | None:
    """Delete a namespace whole, unless somebody uses it; says why not, where it stays."""
    with _alone(namespace.folder) as reason:
        if reason is None:
            # In one go, so that nobody meets half of it.
            gone = namespace.folder.with_name(f"{_REMOVED}{secrets.token_hex(6)}")
            namespace.folder.rename(gone)
            remove_tree(gone, ignore_errors=False)
    return reason


def remove_leftovers(cache_dir: Path) -> int:
    """Delete what a killed removal has left; gives its bytes."""
    leftovers = list((cache_dir / "reference").glob(f"{_REMOVED}*"))
    freed = sum(map(_num_bytes, leftovers))
    for path in leftovers:
        remove_tree(path)
    return freed


@contextmanager
def _alone(folder: Path) -> Iterator[str | None]:
    """Keep others out of a namespace; gives why that cannot be, if it cannot."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    reason = None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        reason = "a run is using it"
    except OSError:
        reason = (
            "its file system has no locks, so that nobody can tell whether a run is using it: "
            "delete the folder by hand"
        )
    try:
        yield reason
    finally:
        os.close(lock)


def _is_namespace(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _look_at(folder: Path) -> Namespace:
    about, unreadable, number = folder / "namespace.json", [], 0
    try:
        fields = json.loads(about.read_text("utf-8"))
        last_used = about.stat().st_mtime
    except (OSError, ValueError):
        fields, last_used = {}, folder.stat().st_mtime
    for path in shards_in(folder):
        try:
            with safe_open(path, framework="np") as file:
                number += file.get_slice("keys").get_shape()[0]
        except (SafetensorError, OSError):
            unreadable.append(path)
    fields = fields if isinstance(fields, dict) else {}
    return Namespace(folder, fields, number, _num_bytes(folder), last_used, unreadable)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
