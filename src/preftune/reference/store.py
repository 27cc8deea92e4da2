"""Reference log-probs on disk: one small file a shard, one entry an answer.

    <cache_dir>/reference/<namespace>/namespace.json           what the values depend on
    <cache_dir>/reference/<namespace>/<pass>.plan              the answers a pass computes
    <cache_dir>/reference/<namespace>/<pass>-00000.safetensors  keys, offsets, per_token, sums

A shard is written beside and renamed, so it is whole or absent. Values are per-token log-probs in
fp32 with their sum in fp64, which serves every sequence loss and every beta.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from preftune.errors import CacheError
from preftune.files import replacing, write_atomically

KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class StoredLogps:
    """The reference's log-probs of one answer, in nats."""

    sum: float
    per_token: np.ndarray
    """fp32, one a scored token."""


class ReferenceStore:
    """The stored values of one namespace."""

    def __init__(self, cache_dir: Path, namespace: str, fields: dict[str, Any]) -> None:
        """Open the namespace, making its folder if it is new.

        Args:
            cache_dir: the root of preftune's cache.
            namespace: `fingerprints.namespace_key(fields)`.
            fields: kept beside the values, for people and for `cache show`.
        """
        self.folder = cache_dir / "reference" / namespace
        self.namespace = namespace
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "namespace.json").exists():
                text = json.dumps(fields, indent=1, sort_keys=True, default=str)
                write_atomically(self.folder / "namespace.json", text)
        except OSError as error:
            raise CacheError(
                f"cannot write reference log-probs to {self.folder} ({error.strerror or error}); "
                "set --cache_dir to a folder you can write to"
            ) from error

    def read(self, *, skip_pass: str | None = None) -> dict[bytes, StoredLogps]:
        """All entries, by key.

        Args:
            skip_pass: leave out the shards of this pass.

        Raises:
            CacheError: a shard is damaged; a damaged value is never replaced by a default.
        """
        entries: dict[bytes, StoredLogps] = {}
        shards = [(path.stat().st_mtime_ns, path) for path in self.folder.glob("*.safetensors")]
        for _, path in sorted(shards):
            if skip_pass is None or not path.name.startswith(f"{skip_pass}-"):
                # The oldest value stays the value, whoever computed the same answer later.
                entries = self.read_shard(path) | entries
        return entries

    def read_plan(self, pass_id: str) -> list[bytes] | None:
        """The answers that a pass has to compute, in order; None if it never started."""
        path = self._plan_path(pass_id)
        if not path.exists():
            return None
        packed = path.read_bytes()
        return [packed[i : i + KEY_BYTES] for i in range(0, len(packed), KEY_BYTES)]

    def write_plan(self, pass_id: str, keys: Sequence[bytes]) -> None:
        """Keep what a pass has to compute."""
        with replacing(self._plan_path(pass_id)) as temporary:
            temporary.write_bytes(b"".join(keys))

    def _plan_path(self, pass_id: str) -> Path:
        return self.folder / f"{pass_id}.plan"

    def read_shard(self, path: Path) -> dict[bytes, StoredLogps]:
        """The entries of one shard.

        Raises:
            CacheError: the file is damaged.
        """
        try:
            shard = load_file(path)
            keys, offsets = shard["keys"], shard["offsets"]
            per_token, sums = shard["per_token"], shard["sums"]
            if (
                len(offsets) != len(keys) + 1
                or len(sums) != len(keys)
                or offsets[-1] != len(per_token)
            ):
                raise ValueError("its parts disagree in length")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CacheError(
                f"the shard {path} of the reference store is damaged ({error}); "
                "delete that file, and its values are computed again"
            ) from error
        return {
            key.tobytes(): StoredLogps(float(total), per_token[start:end])
            for key, total, start, end in zip(keys, sums, offsets[:-1], offsets[1:], strict=True)
        }

    def shard_path(self, pass_id: str, index: int) -> Path:
        """Where shard `index` of a pass lies."""
        return self.folder / f"{pass_id}-{index:05d}.safetensors"

    def write_shard(self, path: Path, entries: Mapping[bytes, StoredLogps]) -> None:
        """Write one shard, whole or not at all, in the order of the entries."""
        lengths = [len(entry.per_token) for entry in entries.values()]
        tensors = {
            "keys": np.frombuffer(b"".join(entries), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "offsets": np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
            "per_token": np.concatenate([entry.per_token for entry in entries.values()]),
            "sums": np.array([entry.sum for entry in entries.values()], dtype=np.float64),
        }
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"cannot write reference log-probs to {path} ({error}); free some space or set "
                "--cache_dir, and run the same command: finished shards are kept"
            ) from error
