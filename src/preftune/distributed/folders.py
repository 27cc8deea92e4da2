"""Which ranks see the same folder: found out by writing there, as names of hosts do not tell."""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from preftune.distributed.ranks import Ranks
from preftune.errors import ConfigError

PROBE = ".seen-"
"""Begins the names of the files that ranks write to find each other; a kill may leave one."""


@dataclass(frozen=True)
class SeenFolder:
    """Who sees whose files in a folder that has one path on all ranks."""

    leaders: tuple[int, ...]
    """For each rank, the first rank that sees the same folder: one for each file system."""
    hosts: tuple[str, ...]
    """Of each rank."""

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see one folder."""
        return not any(self.leaders)

    def leads(self, rank: int) -> bool:
        """Whether this rank is its file system's first."""
        return self.leaders[rank] == rank


def look_at_folder(ranks: Ranks, key: str, folder: Path) -> SeenFolder:
    """Find out which ranks see each other's files in `folder`, which is made where it is absent.

    Args:
        ranks: all of them call this.
        key: the option that names the folder.
        folder: its path on this rank.

    Raises:
        ConfigError: a rank cannot write there.
    """
    if ranks.world_size == 1:
        return SeenFolder((0,), (ranks.host,))
    token = ranks.send(secrets.token_hex(8))

    def probe(rank: int) -> Path:
        return folder / f"{PROBE}{token}-{rank}"

    def write() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe(ranks.rank).write_text(token)
        except OSError as error:
            raise ConfigError(
                f"{key} is {str(folder)!r}, where nothing can be written ({error.strerror}); free "
                f"some space there, or give another --{key}"
            ) from error

    try:
        ranks.together(write)
        # Not a listing, which a network file system may have kept from before.
        first = next(rank for rank in range(ranks.world_size) if _holds(probe(rank), token))
        told = ranks.gather((first, ranks.host))
    finally:
        with suppress(OSError):
            probe(ranks.rank).unlink(missing_ok=True)
    leaders, hosts = zip(*told, strict=True)
    return SeenFolder(leaders, hosts)


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except OSError:
        return False
