"""`preftune launch`: local, hosts, slurm, kubernetes, skypilot."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.cli.options import options_or_help, wants_help
from preftune.config.launch import (
    LaunchHostsConfig,
    LaunchKubernetesConfig,
    LaunchLocalConfig,
    LaunchSkypilotConfig,
    LaunchSlurmConfig,
    ProcessesSection,
)
from preftune.errors import ConfigError
from preftune.launch.hosts import describe_hosts, launch_hosts
from preftune.launch.kubernetes import describe_kubernetes, write_kubernetes
from preftune.launch.local import describe_local, launch_local
from preftune.launch.program import Program, check_world_size, parse_program
from preftune.launch.skypilot import describe_skypilot, write_skypilot
from preftune.launch.slurm import describe_slurm, launch_slurm


@dataclass(frozen=True)
class _Way:
    """A way to start processes."""

    config: type[Any]
    what: str
    launch: Callable[[Program, Any], int]
    describe: Callable[[Program, Any], str]
    """What would be done, for --dry_run."""


WAYS = {
    "local": _Way(
        LaunchLocalConfig,
        "Run a command in several processes of this machine. After one is lost, all start again "
        "from the last checkpoint. The exit code is that of the processes.",
        launch_local,
        describe_local,
    ),
    "hosts": _Way(
        LaunchHostsConfig,
        "Run a command on several hosts: give the same command on each of them. They meet on the "
        "first; after a process or a host is lost, all start again from the last checkpoint.",
        launch_hosts,
        describe_hosts,
    ),
    "slurm": _Way(
        LaunchSlurmConfig,
        "Write a batch script and submit it with sbatch. A run that is told to stop saves a "
        "checkpoint and ends with exit code 75; its job is then requeued and goes on.",
        launch_slurm,
        describe_slurm,
    ),
    "skypilot": _Way(
        LaunchSkypilotConfig,
        "Write a task file for SkyPilot: sky launch FILE, or sky jobs launch FILE, which goes on "
        "after an interruption.",
        write_skypilot,
        describe_skypilot,
    ),
    "kubernetes": _Way(
        LaunchKubernetesConfig,
        "Write a manifest of a Kubernetes job: kubectl apply -f FILE.",
        write_kubernetes,
        describe_kubernetes,
    ),
}


def run(argv: Sequence[str]) -> int:
    """Launch.

    Args:
        argv: the words after `launch`.
    """
    own, program_words = list(argv), []
    if "--" in own:
        at = own.index("--")
        own, program_words = own[:at], own[at + 1 :]
    name, rest = (own[0], own[1:]) if own else ("", [])
    if name not in WAYS:
        if wants_help(own):
            print(_help(), end="")
            return 0
        said = f"launch {name} is not a command" if name else "launch needs a command"
        raise ConfigError(f"{said}; write: preftune launch {', '.join(WAYS)}, with --help")
    way = WAYS[name]
    rest = ["--dry_run" if word == "--dry-run" else word for word in rest]
    config = options_or_help(way.config, rest, _usage(name), way.what)
    if config is None:
        return 0
    program = parse_program(program_words)
    _check(program, config)
    if config.dry_run:
        print(way.describe(program, config))
        return 0
    return way.launch(program, config)


def _check(program: Program, config: Any) -> None:
    """See that the processes fit the command.

    Raises:
        ConfigError: they do not.
    """
    section: ProcessesSection = config
    if (found := os.environ.get("WORLD_SIZE")) is not None:
        raise ConfigError(
            f"WORLD_SIZE is {found} in the environment, so another launcher has started this "
            "command; start preftune launch alone, or train without it"
        )
    hosts = len(getattr(config, "hosts", None) or []) or getattr(config, "num_hosts", 1)
    check_world_size(program, section.processes * hosts)
    least = getattr(config, "min_hosts", None)
    if least is not None and least < hosts:
        if getattr(program.config, "total_batch_size", None) is None:
            raise ConfigError(
                f"min_hosts is {least} of {hosts} hosts, so the number of processes may change; "
                "set --total_batch_size after --, or the steps would change with it"
            )
        for number in range(least, hosts):
            check_world_size(program, section.processes * number)


def _usage(name: str) -> str:
    return f"preftune launch {name} --num_processes N [--key value ...] -- train ..."


def _help() -> str:
    lines = [f"  {_usage(name)}\n      {way.what}\n" for name, way in WAYS.items()]
    return "usage: preftune launch WAY --num_processes N ... -- COMMAND ...\n\n" + "".join(lines)
