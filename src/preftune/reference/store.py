"""Reference log-probs on disk: one small file a shard, one entry an answer.

    <cache_dir>/reference/<namespace>/namespace.json           what the values depend on
    <cache_dir>/reference/<namespace>/<pass>.plan              the answers a pass computes
    <cache_dir>/reference/<namespace>/<pass>-00000.safetensors  keys, offsets, per_token, sums

A shard is written beside and renamed, so it is whole or absent, and it carries a checksum of all
it holds: one flipped bit is an error, never a value. Values are per-token log-probs in fp32 with
their sum in fp64, which serves every sequence loss and every beta.

Locks are flocks, which the kernel frees when their holder ends, however it ends: one shared by all
that use a namespace, so that nobody deletes it meanwhile; one while a pass decides what to compute;
one a shard that is being computed. On a file system without locks two processes may compute the
same shard, and write the same.
"""

import fcntl
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from preftune.errors import CacheError
from preftune.files import replacing, write_atomically
from preftune.redaction import redacted

STORE_VERSION = 2
"""Of the files, and part of every namespace: files of another version are never met."""
LOCK = "namespace.lock"
"""Shared by all that use a namespace; who deletes one must have it alone."""
KEY_BYTES = 16
CHECKSUM = "xxh3_128"
_DIGEST_BYTES = 16
_MISMATCH = "its checksum is not that of its content"


@dataclass(frozen=True, slots=True)
class StoredLogps:
    """The reference's log-probs of one answer, in nats."""

    sum: float
    per_token: np.ndarray
    """fp32, one a scored token."""


class ReferenceStore:
    """The stored values of one namespace, which is in use until this object is gone."""

    def __init__(
        self, cache_dir: Path, namespace: str, fields: Mapping[str, Any], *, model: str = ""
    ) -> None:
        """Open the namespace, making its folder if it is new.

        Args:
            cache_dir: the root of preftune's cache.
            namespace: `fingerprints.namespace_key(fields)`.
            fields: kept beside the values, for people and for `cache show`.
            model: what the user calls the model; kept too, though nothing depends on it.

        Raises:
            CacheError: the folder cannot be written.
        """
        self.folder = cache_dir / "reference" / namespace
        self.namespace = namespace
        about = self.folder / "namespace.json"
        with _writing(self.folder):
            lock = _open_in_use(self.folder)
            weakref.finalize(self, os.close, lock)
            if not about.exists():
                known = {"model": redacted(model), **fields}
                write_atomically(about, json.dumps(known, indent=1, sort_keys=True, default=str))
            os.utime(about)  # the time of the last use, for `cache prune`

    def read(self, *, skip_pass: str | None = None) -> dict[bytes, StoredLogps]:
        """All entries, by key.

        Args:
            skip_pass: leave out the shards of this pass.

        Raises:
            CacheError: a shard is damaged; a damaged value is never replaced by a default.
        """
        entries: dict[bytes, StoredLogps] = {}
        for path in shards_in(self.folder):
            if skip_pass is None or not path.name.startswith(f"{skip_pass}-"):
                # The oldest value stays the value, whoever computed the same answer later.
                entries = read_shard(path) | entries
        return entries

    def read_pass(self, pass_id: str) -> dict[bytes, StoredLogps]:
        """The entries that one pass has computed so far, by key.

        Raises:
            CacheError: a shard is damaged.
        """
        entries: dict[bytes, StoredLogps] = {}
        for path in self.folder.glob(f"{pass_id}-*.safetensors"):
            entries |= read_shard(path)
        return entries

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Be the only process that decides what a pass computes; others wait."""
        with _writing(self.folder):
            lock = _open_lock(self.folder / "plans.lock")
        try:
            _lock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def read_plan(self, pass_id: str) -> list[bytes] | None:
        """The answers that a pass has to compute, in order; None if it never started.

        Raises:
            CacheError: the file is damaged.
        """
        path = self._plan_path(pass_id)
        try:
            packed = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _damaged("plan", path, error) from error
        keys, digest = packed[:-_DIGEST_BYTES], packed[-_DIGEST_BYTES:]
        if len(keys) % KEY_BYTES or _plan_digest(pass_id, keys) != digest:
            raise _damaged("plan", path, _MISMATCH)
        return [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]

    def write_plan(self, pass_id: str, keys: Sequence[bytes]) -> None:
        """Keep what a pass has to compute.

        Raises:
            CacheError: it cannot be written.
        """
        path, packed = self._plan_path(pass_id), b"".join(keys)
        with _writing(path), replacing(path) as temporary:
            temporary.write_bytes(packed + _plan_digest(pass_id, packed))

    def _plan_path(self, pass_id: str) -> Path:
        return self.folder / f"{pass_id}.plan"

    def shard_path(self, pass_id: str, index: int) -> Path:
        """Where shard `index` of a pass lies."""
        return self.folder / f"{pass_id}-{index:05d}.safetensors"

    @contextmanager
    def claim(self, path: Path) -> Iterator[bool]:
        """Ask for a shard to compute; gives whether it is ours until the block ends.

        Somebody may have written it just before: look again once it is ours.

        Raises:
            CacheError: the folder cannot be written.
        """
        lock_path = path.with_suffix(".lock")
        with _writing(path):
            lock = _open_lock(lock_path)
        try:
            is_ours = _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield is_ours
            # Who has this file open still gets the lock of a file without a name, and looks again.
            if is_ours and path.exists():
                lock_path.unlink(missing_ok=True)
        finally:
            os.close(lock)

    def write_shard(self, path: Path, entries: Mapping[bytes, StoredLogps]) -> None:
        """Write one shard, whole or not at all, in the order of the entries.

        Raises:
            CacheError: it cannot be written.
        """
        lengths = [len(entry.per_token) for entry in entries.values()]
        tensors = {
            "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            "per_token": np.concatenate([entry.per_token for entry in entries.values()]),
            "sums": np.array([entry.sum for entry in entries.values()], dtype=np.float64),
        }
        with _writing(path), replacing(path) as temporary:
            save_file(tensors, temporary, metadata={CHECKSUM: _checksum(tensors)})

    def write_copy(self, name: str, content: bytes) -> None:
        """Take over a file of the same namespace on another file system, whole or not at all.

        Raises:
            CacheError: it cannot be written.
        """
        path = self.folder / name
        with _writing(path), replacing(path) as temporary:
            temporary.write_bytes(content)


def shards_in(folder: Path) -> list[Path]:
    """The files of a namespace that hold values, oldest first."""
    shards = [(path.stat().st_mtime_ns, path) for path in folder.glob("*.safetensors")]
    return [path for _, path in sorted(shards)]


def read_shard(path: Path) -> dict[bytes, StoredLogps]:
    """The entries of one shard.

    Raises:
        CacheError: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            checksum = (file.metadata() or {}).get(CHECKSUM)
            shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if checksum != _checksum(shard):
            raise ValueError(_MISMATCH)
        keys, offsets = shard["keys"], shard["offsets"]
        per_token, sums = shard["per_token"], shard["sums"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damaged("shard", path, error) from error
    return {
        key.tobytes(): StoredLogps(float(total), per_token[start:end])
        for key, total, start, end in zip(keys, sums, offsets[:-1], offsets[1:], strict=True)
    }


def _plan_digest(pass_id: str, keys: bytes) -> bytes:
    return xxhash.xxh3_128_digest(pass_id.encode() + keys)


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Of names, shapes, types and bytes."""
    digest = xxhash.xxh3_128()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name}|{values.shape}|{values.dtype}|".encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _damaged(what: str, path: Path, why: object) -> CacheError:
    return CacheError(
        f"the {what} {path} of the reference store is damaged ({why}); delete that file, and what "
        "it held is computed again"
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell what cannot be written with a remedy.

    Raises:
        CacheError: in place of what the system says.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CacheError(
            f"cannot write reference log-probs to {path} ({reason}); free some space there, or "
            "give with --cache_dir a folder that you can write to, and run the same command: "
            "finished shards are kept"
        ) from error


def _open_in_use(folder: Path) -> int:
    """Make a folder and lock it against being deleted; waits where that is just being done."""
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = _open_lock(path)
        except FileNotFoundError:  # deleted in between
            continue
        _remove_leftovers(folder, lock)
        _lock(lock, fcntl.LOCK_SH)
        if path.exists():
            return lock
        os.close(lock)


def _remove_leftovers(folder: Path, lock: int) -> None:
    """Delete what processes that were killed left half-written, if nobody else is writing here."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody is, or nobody can tell
        return
    for path in (*folder.glob(".*"), *folder.glob("*-*.lock")):  # a shard's lock outlives a kill
        path.unlink()


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(descriptor: int, operation: int) -> bool:
    """Whether the lock is ours; as if, on a file system without locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
