"""From how processes ended to what the launcher does: end, or start them again."""

from collections.abc import Sequence
from dataclasses import dataclass

from preftune.errors import Interrupted
from preftune.launch.ranks import Failure


@dataclass(frozen=True)
class Verdict:
    """What one attempt has come to."""

    code: int
    """Exit code of the launcher, unless it starts again."""
    again: bool
    """Whether the processes are to be started again."""
    cause: Failure | None = None
    why: str = ""
    """Why it is not started again, where that is not plain."""


def judge(
    failures: Sequence[Failure],
    lost_hosts: Sequence[str],
    before: Failure | None,
    *,
    stopping: bool,
    restarts_left: int,
) -> Verdict:
    """Judge an attempt whose processes have all ended.

    Args:
        failures: in the order in which they became known.
        lost_hosts: those that are not heard any more.
        before: the cause of the attempt before this one, if there was one.
        stopping: whether a signal has asked the launcher to end.
        restarts_left: how often it may start again.
    """
    if not failures and not lost_hosts:
        return Verdict(0, again=False)
    cause = cause_of(failures)
    if stopping:
        saved = any(failure.code == Interrupted.exit_code for failure in failures)
        return Verdict(Interrupted.exit_code if saved else 1, again=False, cause=cause)
    if cause is not None and cause.is_final and not lost_hosts:
        return Verdict(cause.code, again=False, cause=cause)
    if restarts_left == 0:
        return Verdict(1, again=False, cause=cause, why="max_restarts is used up")
    if _is_same(cause, before) and not lost_hosts:
        why = "it ended with the same error as before its restart"
        return Verdict(1, again=False, cause=cause, why=why)
    return Verdict(1, again=True, cause=cause)


def cause_of(failures: Sequence[Failure]) -> Failure | None:
    """The failure that the others follow from: the first one that need not follow from another."""
    own = [failure for failure in failures if not failure.is_consequence]
    killed = [failure for failure in own if failure.code < 0]
    final = [failure for failure in failures if failure.is_final]
    # A lost rank may make another one fail in any way; wrong input on one rank, only as a lost
    # peer.
    return next(iter([*killed, *final, *own, *failures]), None)


def _is_same(cause: Failure | None, before: Failure | None) -> bool:
    """Whether an error has come back that a rank raised by itself."""
    if cause is None or before is None or cause.is_consequence or not cause.text:
        return False
    return (cause.code, cause.text) == (before.code, before.text)
