"""Processes on several hosts, each of which runs the same command."""

import socket
from collections.abc import Sequence

from preftune.config.launch import HostsSection, LaunchHostsConfig
from preftune.errors import ConfigError
from preftune.launch.conductor import Conductor, Plan, Signals
from preftune.launch.environment import Place, is_this_machine
from preftune.launch.link import listen
from preftune.launch.local import check_gpus, described, say
from preftune.launch.member import Member
from preftune.launch.program import Program


def launch_hosts(program: Program, config: LaunchHostsConfig) -> int:
    """Run this host's share of the processes of a command.

    Args:
        program: the command.
        config: the hosts, and what to do when one is lost.

    Returns:
        The exit code, which is that of the processes of all hosts.

    Raises:
        ConfigError: this host is none of them, has fewer GPUs, or its port is taken.
    """
    rank = host_rank(config)
    check_gpus(config.processes)
    plan = Plan(
        program,
        config.processes,
        tuple(config.hosts or ()),
        max_restarts=config.max_restarts,
        end_seconds=config.end_seconds,
        min_hosts=config.min_hosts,
        join_seconds=config.join_seconds,
        silence_seconds=config.silence_seconds,
    )
    signals = Signals()
    if rank:
        launcher = Member(plan, rank, config.port, signals, say)
    else:
        launcher = Conductor(plan, signals, say, _listener(config))
    signals.catch()
    try:
        return launcher.run()
    finally:
        launcher.close()


def host_rank(section: HostsSection) -> int:
    """Which of the hosts this machine is.

    Raises:
        ConfigError: none of them, or several.
    """
    if section.host_rank is not None:
        return section.host_rank
    hosts: Sequence[str] = section.hosts or ()
    found = [rank for rank, host in enumerate(hosts) if is_this_machine(host)]
    if len(found) != 1:
        what = "several of them are" if found else "none of them is"
        raise ConfigError(
            f"hosts is {', '.join(hosts)}: {what} a name or address of this machine; give "
            "--host_rank"
        )
    return found[0]


def describe_hosts(program: Program, config: LaunchHostsConfig) -> str:
    """What would run on each host: a line a process, for a shell."""
    hosts, size = config.hosts or [], config.processes
    parts = []
    for rank, host in enumerate(hosts):
        place = Place(rank, rank * size, size * len(hosts), hosts[0], None)
        parts.append(f"# host {rank}: {host}\n{described(program, place, size)}")
    return "\n".join(parts)


def _listener(config: HostsSection) -> socket.socket:
    try:
        return listen(config.port)
    except OSError as error:
        raise ConfigError(
            f"port is {config.port}: {error.strerror or error}; give another --port on all hosts"
        ) from error
