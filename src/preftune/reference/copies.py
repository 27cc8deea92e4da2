"""The same values on every file system, where hosts have folders of their own."""

from preftune.distributed.ranks import Ranks
from preftune.reference.store import ReferenceStore, shards_in


def copy_to_file_systems(store: ReferenceStore, ranks: Ranks, *, is_leader: bool) -> None:
    """Copy what rank 0's store has to the stores that lack it, file by file.

    A run whose rank 0 is on another host the next time then finds its values there.

    Args:
        store: of this rank; on a file system that several share, that of all of them.
        ranks: all of them call this, unless all share one file system.
        is_leader: whether this rank writes for its file system.

    Raises:
        CacheError: a file cannot be written; on every rank.
    """
    names = ranks.decide(
        # Plans last: one that is there says that its pass is, too.
        lambda: [path.name for path in (*shards_in(store.folder), *store.folder.glob("*.plan"))]
    )
    absent = {name for name in names if is_leader and not (store.folder / name).exists()}
    wanted = set().union(*ranks.gather(absent))
    for name in names:
        if name in wanted:
            content = ranks.decide((store.folder / name).read_bytes)
            ranks.together(lambda name=name, content=content: _write(store, name, content, absent))


def _write(store: ReferenceStore, name: str, content: bytes, absent: set[str]) -> None:
    if name in absent:
        store.write_copy(name, content)
