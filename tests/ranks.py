"""Ranks that are threads of one process, for what they tell each other and who does what."""

import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from preftune.distributed.ranks import Ranks

PATIENCE = 30
"""Seconds after which a rank that waits for another gives up: the test then fails."""


@dataclass
class _Board:
    barrier: threading.Barrier
    values: dict[int, bytes] = field(default_factory=dict)


class ThreadRanks(Ranks):
    """A thread among its peers; two of them share a host."""

    def __init__(self, rank: int, board: _Board) -> None:
        self._rank, self._board = rank, board

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._board.barrier.parties

    @property
    def host(self) -> str:
        return f"host{self.rank // 2}"

    def gather(self, value: Any) -> list[Any]:
        self._board.values[self.rank] = pickle.dumps(value)
        self._board.barrier.wait(PATIENCE)
        values = [pickle.loads(self._board.values[rank]) for rank in range(self.world_size)]
        self._board.barrier.wait(PATIENCE)
        return values

    def send(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]

    def send_into(self, tensor: Any) -> None:
        tensor.copy_(self.send(tensor))


def on_ranks(number: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, on each of `number` ranks.

    One that ends with an exception of its own takes those with it that wait for it.
    """
    board = _Board(threading.Barrier(number))
    outcomes: list[Any] = [None] * number

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadRanks(rank, board))
        except BaseException as error:
            outcomes[rank] = error
            if getattr(error, "rank", None) is None:
                board.barrier.abort()  # as connections close with a process

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
