"""The launcher of the first host, or of the only one: it decides for all.

Attempt by attempt: it waits for the hosts, tells each where its ranks stand, hears how they end,
has all end when one is lost, and starts them again from the last checkpoint.
"""

import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from preftune.errors import ConfigError
from preftune.launch.environment import Place, free_port, interface_of
from preftune.launch.link import Link, Message, accepted, wait_for
from preftune.launch.program import Program
from preftune.launch.ranks import Failure, Ranks
from preftune.launch.verdict import Verdict, judge

TICK = 0.1
"""Seconds between two looks at the processes."""
LOOPBACK = "lo" if sys.platform == "linux" else None


@dataclass(frozen=True)
class Plan:
    """What to launch, and how patiently."""

    program: Program
    num_processes: int
    hosts: Sequence[str]
    """The first is this one."""
    max_restarts: int = 3
    end_seconds: float = 30.0
    min_hosts: int | None = None
    """None: all."""
    join_seconds: float = 300.0
    silence_seconds: float = 30.0


@dataclass
class Signals:
    """What signals have asked of the launcher; kept until its loop looks."""

    waiting: list[int] = field(default_factory=list)
    stopping: bool = False

    def catch(self) -> None:
        """Take SIGTERM, SIGINT and SIGUSR1 from now on."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda caught, _: self.waiting.append(caught))

    def pass_on(self, ranks: Ranks | None) -> None:
        """Give the ranks what has come since the last call."""
        while self.waiting:
            number = self.waiting.pop(0)
            self.stopping = self.stopping or number != signal.SIGUSR1
            if ranks is not None:
                ranks.signal(number)


def named(rank: int, host: str, address: str) -> str:
    """A host in words.

    Args:
        rank: of the host.
        host: what the user calls it.
        address: where its launcher is.
    """
    return f"host {rank} ({host})" if host == address else f"host {rank} ({host}, {address})"


class Conductor:
    """Runs a plan to its end."""

    def __init__(
        self, plan: Plan, signals: Signals, say: Callable[..., None], listener: socket.socket | None
    ) -> None:
        """Nothing is started yet.

        Args:
            plan: what to launch.
            signals: caught ones.
            say: tells people a sentence; `as_it_is=True`: what a rank says itself.
            listener: where the other hosts come; None without any.
        """
        self._plan = plan
        self._program = plan.program
        self._signals = signals
        self._say = say
        self._listener = listener
        self._links: dict[int, Link] = {}
        """Of hosts that have joined, by their rank."""
        self._strangers: list[Link] = []
        """Connections that have not said yet who they are."""
        self._ranks: Ranks | None = None
        self._failures: list[Failure] = []
        self._busy: set[int] = set()
        """Hosts whose ranks run."""
        self._lost: list[str] = []
        self._stopping_elsewhere = False
        self._refused = ""
        """What is wrong with a host that came while the others are awaited."""

    def run(self) -> int:
        """Launch, and start again where that helps.

        Returns:
            The exit code, which is that of the ranks.
        """
        before: Failure | None = None
        for attempt in range(self._plan.max_restarts + 1):
            absent = self._gather()
            if self._refused:
                return self._dismiss(ConfigError.exit_code, self._refused)
            if self._stopping:
                return self._dismiss(1, "stopped before the processes were started")
            if absent:
                return self._dismiss(1, absent)
            verdict = self._attempt(before, self._plan.max_restarts - attempt)
            if not verdict.again:
                return self._dismiss(verdict.code, verdict.why)
            before, self._program = verdict.cause, self._program.again()
            self._say(
                f"restart {attempt + 1} of {self._plan.max_restarts}, from the last checkpoint"
            )
        raise AssertionError("the last attempt leaves no restart")

    def close(self) -> None:
        """Leave nothing running or open."""
        if self._ranks is not None:
            self._ranks.kill()
        for link in [*self._links.values(), *self._strangers]:
            link.close()

    @property
    def _stopping(self) -> bool:
        return self._signals.stopping or self._stopping_elsewhere

    # ---------------------------------------------------------------- hosts come
    def _gather(self) -> str:
        """Wait for the hosts; which are absent at the end, in words, where that is too many."""
        hosts, seconds = self._plan.hosts, self._plan.join_seconds
        since = time.monotonic()
        told, self._refused = False, ""
        while len(self._links) + 1 < len(hosts) and not (self._stopping or self._refused):
            waited = time.monotonic() - since
            absent = [name for rank, name in enumerate(hosts[1:], 1) if rank not in self._links]
            if waited > seconds:
                few = len(self._links) + 1 < (self._plan.min_hosts or len(hosts))
                said = f"{', '.join(absent)} did not come within {seconds:g} s"
                if few:
                    return f"{said}: start the same command there, and see that it reaches this one"
                self._say(f"{said}: going on without")
                return ""
            if not told and waited > 1:
                told = True
                self._say(f"waiting for {', '.join(absent)}")
            self._tick()
        return ""

    def _meet(self) -> None:
        """Take up hosts that have said who they are."""
        if self._listener is None:
            return
        self._strangers += accepted(self._listener)
        for link in list(self._strangers):
            for message in link.tick()[:1]:
                self._strangers.remove(link)
                self._admit(link, message)
            if link in self._strangers and (link.closed or link.silent_for > 10):
                self._strangers.remove(link)
                link.close()

    def _admit(self, link: Link, message: Message) -> None:
        rank, hosts = message.get("host_rank"), self._plan.hosts
        if message["say"] != "hello" or not isinstance(rank, int) or not 0 < rank < len(hosts):
            link.close()
            return
        theirs = message.get("num_processes")
        wrong = ""
        if message.get("digest") != self._plan.program.digest:
            wrong = "another command, configuration or version of preftune"
        elif theirs != self._plan.num_processes:
            wrong = f"num_processes {theirs}, not {self._plan.num_processes}"
        elif rank in self._links:
            wrong = f"a host_rank that {self._links[rank].address} has already"
        if not wrong:
            self._links[rank] = link
            return
        said = f"{named(rank, hosts[rank], link.address)} launches with {wrong}"
        self._refused = f"{said}; all hosts must run the same command"
        link.send(say="done", code=ConfigError.exit_code, text=self._refused)
        link.close()

    # ---------------------------------------------------------------- one attempt
    def _attempt(self, before: Failure | None, restarts_left: int) -> Verdict:
        self._failures.clear()
        self._lost.clear()
        self._start()
        while self._busy or (self._ranks is not None and self._ranks.running):
            self._tick()
        self._ranks = None
        self._tell_errors()
        return judge(
            self._failures,
            self._lost,
            before,
            stopping=self._stopping,
            restarts_left=restarts_left,
        )

    def _start(self) -> None:
        plan = self._plan
        present = [0, *sorted(self._links)]
        size, port = plan.num_processes, free_port()
        host, alone = plan.hosts[0], len(plan.hosts) == 1
        interface = LOOPBACK if alone else None
        for index, rank in enumerate(present):
            if rank == 0:
                continue
            link = self._links[rank]
            interface = interface or interface_of(link.own_address)
            link.send(
                say="start",
                host_rank=index,
                first_rank=index * size,
                world_size=len(present) * size,
                address=host,
                port=port,
                again=self._program is not plan.program,
            )
        self._busy = set(self._links)
        place = Place(0, 0, len(present) * size, host, port, interface)
        self._ranks = Ranks(self._program, size, place, "" if alone else host, plan.end_seconds)

    def _tick(self) -> None:
        sockets = [link.socket for link in [*self._links.values(), *self._strangers]]
        wait_for([*sockets, *([self._listener] if self._listener else [])], TICK)
        self._signals.pass_on(self._ranks)
        self._meet()
        for rank, link in list(self._links.items()):
            for message in link.tick():
                self._hear(rank, message)
            if link.closed or link.silent_for > self._plan.silence_seconds:
                self._lose(rank, link)
        if self._ranks is not None:
            for failure in self._ranks.poll():
                self._note(failure)

    def _hear(self, rank: int, message: Message) -> None:
        match message["say"]:
            case "failed":
                self._note(Failure(**message["failure"]))
            case "ended":
                self._busy.discard(rank)
            case "stopping":
                self._stopping_elsewhere = True

    def _note(self, failure: Failure) -> None:
        said = f"{failure.who} {failure.how}"
        if not (failure.is_consequence or failure.is_final):
            # What a rank says itself is told when all have ended, once for those that agree.
            self._say(f"{said}; ending the others")
        self._failures.append(failure)
        self._end_all(said)

    def _lose(self, rank: int, link: Link) -> None:
        silence = self._plan.silence_seconds
        how = "its launcher has gone" if link.closed else f"not a word for {silence:g} s"
        link.close()
        del self._links[rank]
        if rank in self._busy:
            name = named(rank, self._plan.hosts[rank], link.address)
            self._busy.discard(rank)
            self._lost.append(name)
            self._say(f"lost {name}: {how}; ending the others")
            self._end_all(f"lost {name}")

    def _end_all(self, why: str) -> None:
        if self._ranks is not None:
            self._ranks.end()
        for rank in self._busy:
            self._links[rank].send(say="end", why=why)

    # ---------------------------------------------------------------- the end
    def _tell_errors(self) -> None:
        """What the ranks say themselves: each sentence once, consequences last."""
        texts: dict[str, list[int]] = {}
        for failure in sorted(self._failures, key=lambda f: (not f.is_final, f.is_consequence)):
            if failure.text:
                texts.setdefault(failure.text, []).append(failure.rank)
        for text, ranks in texts.items():
            if len(texts) > 1:
                self._say(f"rank {', '.join(map(str, sorted(ranks)))}:")
            self._say(text, as_it_is=True)

    def _dismiss(self, code: int, text: str) -> int:
        if text:
            self._say(text)
        for link in self._links.values():
            link.send(say="done", code=code, text=text)
        return code
