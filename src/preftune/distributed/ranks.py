"""What ranks tell each other: one decision, one failure, one start.

A rank that fails alone would leave the others waiting for it. Here it tells them first, so that all
end with the same error, which rank 0 prints.
"""

import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

from preftune.errors import ConfigError, Interrupted, PreftuneError

T = TypeVar("T")
_NAMED = 4
"""Most ranks that a message names for one value."""
_BEAT_SECONDS = 1.0
"""How often ranks tell each other that slow work is still under way."""


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank, as it can be sent."""

    kind: type[PreftuneError]
    problems: list[str]
    host: str


class Ranks:
    """One process among its peers; alone, unless a subclass gives it some.

    A subclass says who this process is, and how values travel (`gather`, `send`, `send_into`).
    """

    forwards_together: bool = False
    """Whether ranks wait for each other within a forward, so that none may leave one alone."""

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return 0

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def host(self) -> str:
        """The machine's name."""
        return socket.gethostname()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, by rank, on every rank; for small things off the device."""
        return [value]

    def send(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        return value

    def send_into(self, tensor: Any) -> None:
        """Overwrite a tensor on the device with rank 0's, which has its shape and dtype."""

    def decide(self, choose: Callable[[], T]) -> T:
        """What `choose` returns on rank 0, on every rank; what it raises there, all raise.

        For what ranks alone could see differently: measurements, folders.
        """
        if self.world_size == 1:
            return choose()
        value, failure, error = self._tried(choose if self.is_main else lambda: None)
        value, failure = self.send((value, failure))
        if failure is not None:
            raise self._shared(failure.kind(failure.problems)) from error
        return value  # pyright: ignore[reportReturnType]  # rank 0's

    def decide_slowly(self, choose: Callable[[], T], stopped: Callable[[], str | None]) -> T:
        """`decide`, for what may take longer than ranks wait for each other, and may be broken off.

        Args:
            choose: runs on rank 0 in a thread, which is left alone where a signal stops the wait.
            stopped: on rank 0: why to stop waiting, if there is a reason.

        Raises:
            Interrupted: with that reason, on every rank.
        """
        done: list[Callable[[], T]] = []

        def work() -> None:
            try:
                value = choose()
                done.append(lambda: value)
            except BaseException as error:
                done.append(partial(_raise, error))

        def is_done() -> bool:
            thread.join(_BEAT_SECONDS)
            if not done and (why := stopped()):
                raise Interrupted(why)
            return bool(done)

        thread = threading.Thread(target=work, daemon=True, name="preftune-slow")
        if self.is_main:
            thread.start()
        while not self.decide(is_done):  # each wait is a short one, so that no collective times out
            pass
        return self.decide(lambda: done[0]())

    def together(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on any of them, all raise that.

        Whatever may fail on one rank alone belongs in here. `work` itself must not wait for other
        ranks, unless what can fail comes before.

        Returns:
            What `work` returned on this rank.

        Raises:
            PreftuneError: the failure of the first rank that has one, with that rank and its host
                named unless all have the same.
        """
        if self.world_size == 1:
            return work()
        value, failure, error = self._tried(work)
        failures = self.gather(failure)
        found = [(rank, told) for rank, told in enumerate(failures) if told is not None]
        if found:
            rank, first = found[0]
            problems = first.problems
            same = [told for _, told in found if told.problems == problems]
            if len(same) < self.world_size:
                also = f", and on {len(found) - 1} other ranks" if len(found) > 1 else ""
                where = f"on rank {rank} of {self.world_size} (host {first.host}{also})"
                problems = [f"{where}: {problem}" for problem in problems]
            raise self._shared(first.kind(problems)) from error
        return value  # pyright: ignore[reportReturnType]  # nothing failed

    def meet(self) -> None:
        """See that every rank has come so far: the first thing that ranks do together.

        Raises:
            PreftuneError: on every rank, with what one has found wrong before.
        """
        self.together(lambda: None)

    def leaders_first(self, work: Callable[[], T], *, is_leader: bool) -> T:
        """Do `work` on the leaders, then on the others, who find what those made."""
        if self.world_size == 1:
            return work()
        led = self.together(work if is_leader else lambda: None)
        followed = self.together(lambda: None if is_leader else work())
        return led if is_leader else followed  # pyright: ignore[reportReturnType]

    def agree(self, facts: Mapping[str, Any], remedy: str) -> None:
        """See that all ranks know the same.

        Args:
            facts: by what people call them; small.
            remedy: what to do where they differ.

        Raises:
            ConfigError: on every rank, with each fact that differs, and the ranks and hosts.
        """
        if self.world_size == 1:
            return
        told = self.gather((self.host, dict(facts)))
        problems = []
        for name in dict.fromkeys(name for _, known in told for name in known):
            ranks_by_value: dict[str, list[str]] = {}
            for rank, (host, known) in enumerate(told):
                value = str(known[name]) if name in known else "not there"
                ranks_by_value.setdefault(value, []).append(f"rank {rank} (host {host})")
            if len(ranks_by_value) > 1:
                values = [f"{value} on {_some(ranks)}" for value, ranks in ranks_by_value.items()]
                problems.append(f"{name} differs between ranks: {'; '.join(values)}; {remedy}")
        if problems:
            raise self._shared(ConfigError(problems))

    def share(self, error: PreftuneError) -> PreftuneError:
        """Mark an error that every rank raises, so that rank 0 alone tells it."""
        return error if self.world_size == 1 else self._shared(error)

    def _shared(self, error: PreftuneError) -> PreftuneError:
        error.rank = self.rank
        return error

    def _tried(
        self, work: Callable[[], T]
    ) -> tuple[T | None, _Failure | None, BaseException | None]:
        try:
            return work(), None, None
        except PreftuneError as error:
            return None, _Failure(type(error), error.problems, self.host), error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            text = f"{error.strerror or error}{where}"
            return None, _Failure(PreftuneError, [text], self.host), error
        except Exception as error:
            # Not foreseen: the traceback is what a report needs.
            text = traceback.format_exc().rstrip()
            return None, _Failure(PreftuneError, [text], self.host), error


ALONE = Ranks()
"""Of a process without peers."""


def _raise(error: BaseException) -> NoReturn:
    raise error


def _some(ranks: list[str]) -> str:
    more = len(ranks) - _NAMED
    return ", ".join(ranks[:_NAMED]) + (f" and {more} more ranks" if more > 0 else "")
