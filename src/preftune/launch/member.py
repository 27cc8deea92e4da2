"""The launcher of any host but the first: it does what the first one says."""

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from preftune.launch.conductor import TICK, Plan, Signals, named
from preftune.launch.environment import Place, interface_of
from preftune.launch.link import Link, Message, wait_for
from preftune.launch.ranks import Ranks

_RETRY_EVERY = 0.5
_CONNECT_SECONDS = 3.0


class Member:
    """Runs the ranks of one host for the first one."""

    def __init__(
        self, plan: Plan, host_rank: int, port: int, signals: Signals, say: Callable[..., None]
    ) -> None:
        """Nothing is started yet.

        Args:
            plan: what to launch.
            host_rank: of this host, 1 or more.
            port: of the first host.
            signals: caught ones.
            say: tells people a sentence.
        """
        self._plan = plan
        self._host_rank = host_rank
        self._port = port
        self._signals = signals
        self._say = say
        self._link: Link | None = None
        self._ranks: Ranks | None = None
        self._outcome: int | None = None
        self._told_stopping = False

    def run(self) -> int:
        """Serve until the first host says that it is over, or is lost.

        Returns:
            The exit code: the first host's, or 1 where it is lost.
        """
        first, lost = self._plan.hosts[0], ""
        while True:
            link = self._join()
            if link is None:
                if self._signals.stopping:
                    self._say("stopped before the processes were started")
                else:
                    patience = f"{self._plan.join_seconds:g} s"
                    self._say(
                        f"{lost or f'host 0 ({first}) cannot be reached'} at port {self._port} "
                        f"within {patience}: see that the same command runs there"
                    )
                return 1
            why = self._serve(link)
            link.close()
            self._end_ranks()
            if self._outcome is not None:
                return self._outcome
            self._say(f"lost {named(0, first, link.address)}: {why}; the ranks here are ended")
            if self._signals.stopping:
                return 1
            lost = f"host 0 ({first}) did not come back"

    def close(self) -> None:
        """Leave nothing running or open."""
        if self._ranks is not None:
            self._ranks.kill()
        if self._link is not None:
            self._link.close()

    def _join(self) -> Link | None:
        """A connection to the first host; None if there is none in time."""
        since = time.monotonic()
        while time.monotonic() - since < self._plan.join_seconds and not self._signals.stopping:
            with suppress(OSError):
                where = (self._plan.hosts[0], self._port)
                link = self._link = Link(socket.create_connection(where, _CONNECT_SECONDS))
                link.send(
                    say="hello",
                    host_rank=self._host_rank,
                    digest=self._plan.program.digest,
                    num_processes=self._plan.num_processes,
                )
                return link
            time.sleep(_RETRY_EVERY)
            self._signals.pass_on(None)
        return None

    def _serve(self, link: Link) -> str:
        """Do what the first host says; why the connection ended."""
        while not link.closed:
            wait_for([link.socket], TICK)
            for message in link.tick():
                self._do(link, message)
            self._signals.pass_on(self._ranks)
            if self._signals.stopping and not self._told_stopping:
                self._told_stopping = True
                link.send(say="stopping")
            self._report(link)
            if self._outcome is not None:
                return ""
            if link.silent_for > self._plan.silence_seconds:
                return f"not a word for {self._plan.silence_seconds:g} s"
        return "its launcher has gone"

    def _do(self, link: Link, message: Message) -> None:
        match message["say"]:
            case "start":
                self._start(link, message)
            case "end":
                if self._ranks is not None:
                    self._say(f"{message['why']}; ending the ranks here")
                    self._ranks.end()
            case "done":
                self._outcome = int(message["code"])
                if message["text"]:
                    self._say(message["text"])

    def _start(self, link: Link, message: Message) -> None:
        place = Place(
            message["host_rank"],
            message["first_rank"],
            message["world_size"],
            message["address"],
            message["port"],
            interface_of(link.own_address),
        )
        program = self._plan.program.again() if message["again"] else self._plan.program
        host = self._plan.hosts[self._host_rank]
        self._ranks = Ranks(program, self._plan.num_processes, place, host, self._plan.end_seconds)

    def _report(self, link: Link) -> None:
        if self._ranks is None:
            return
        for failure in self._ranks.poll():
            link.send(say="failed", failure=failure.as_dict())
            self._ranks.end()
        if not self._ranks.running:
            self._ranks = None
            link.send(say="ended")

    def _end_ranks(self) -> None:
        """Have the ranks end that are still running, in bounded time."""
        while self._ranks is not None and self._ranks.running:
            self._ranks.end()
            for failure in self._ranks.poll():
                if failure.text:
                    self._say(failure.text, as_it_is=True)
            time.sleep(TICK)
        self._ranks = None
