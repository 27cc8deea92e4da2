"""A process that loses another one says which, in words."""

import os
import re
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from preftune.errors import PeerLost

# What gloo, NCCL and torch's store say when the other end is gone or does not answer.
_SIGNS = re.compile(
    r"closed by peer|reset by peer|broken pipe|timed? ?out|socket closed|connection refused|"
    r"connectfullmesh failed|no route to host|network is unreachable|remote process exited|"
    r"network error|remote server shutdown|application timeout|failed to recv|store is gone",
    re.IGNORECASE,
)
_GLOO = re.compile(r"gloo", re.IGNORECASE)
_ADDRESS = re.compile(r"\[?(\d+\.\d+\.\d+\.\d+)\]?")
_PEERS: list[tuple[str, str]] = []
"""Host name and address of every rank, by rank."""


def meet_peers(gather: Callable[[Any], list[Any]]) -> None:
    """Learn where each rank is, once a process.

    Args:
        gather: gives each rank's value, by rank.
    """
    if not _PEERS:
        _PEERS.extend(gather((socket.gethostname(), _own_address())))


def lost_peer(error: Exception) -> PeerLost | None:
    """What a collective raises without its peers, as an error that names them.

    Args:
        error: as it was raised.

    Returns:
        None: it is about something else.
    """
    if not (isinstance(error, RuntimeError) and _is_lost_peer(error)):
        return None
    return PeerLost(
        f"rank {_own_rank()} has lost {_named(str(error))} ({_reason(error)}); what that one says "
        "itself, or its machine, tells why. Run the same command again to go on from the last "
        "checkpoint"
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective, or the way to it, failed; other errors keep their traceback."""
    text = str(error)
    of_torch = isinstance(error, dist.DistError) or bool(_GLOO.search(text))
    return of_torch and bool(_SIGNS.search(text))


def _named(text: str) -> str:
    """Which ranks a message is about: those of the address in it, or any other."""
    own = _own_rank()
    found = _ADDRESS.search(text)
    others = [(rank, *where) for rank, where in enumerate(_PEERS) if rank != own]
    there = [peer for peer in others if found and peer[2] == found.group(1)]
    if not others:
        return found.group(1) if found else "another process"
    names = [f"rank {rank} on {host} ({address})" for rank, host, address in there or others]
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _reason(error: RuntimeError) -> str:
    """The sentence that tells, without the library's source line in front and advice behind."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip())
    return re.split(r"\.\s|\n", text, maxsplit=1)[0].rstrip(".")


def _own_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _own_address() -> str:
    """The address from which this machine reaches rank 0."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "127.0.0.1"), 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
