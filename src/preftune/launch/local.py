"""Processes on this machine."""

import shlex
import sys

from preftune.config.launch import ProcessesSection
from preftune.errors import ConfigError
from preftune.launch.conductor import LOOPBACK, Conductor, Plan, Signals
from preftune.launch.environment import Place, inherited, num_gpus, rank_environment
from preftune.launch.program import Program

ADDRESS = "127.0.0.1"


def launch_local(program: Program, section: ProcessesSection) -> int:
    """Run a command in several processes of this machine.

    Args:
        program: the command.
        section: how many processes, and what to do when one is lost.

    Returns:
        The exit code, which is that of the processes.

    Raises:
        ConfigError: the machine has fewer GPUs.
    """
    check_gpus(section.processes)
    plan = Plan(
        program,
        section.processes,
        (ADDRESS,),
        max_restarts=section.max_restarts,
        end_seconds=section.end_seconds,
    )
    signals = Signals()
    signals.catch()
    conductor = Conductor(plan, signals, say, listener=None)
    try:
        return conductor.run()
    finally:
        conductor.close()


def describe_local(program: Program, section: ProcessesSection) -> str:
    """What would run: a line a process, for a shell."""
    place = Place(0, 0, section.processes, ADDRESS, None, LOOPBACK)
    return described(program, place, section.processes)


def described(program: Program, place: Place, num_processes: int) -> str:
    """The processes of a host, each as a line for a shell."""
    command = shlex.join(program.command)
    lines = [] if place.world_size == 1 else ["# FREE_PORT: a free port, chosen at each start"]
    for local_rank in range(num_processes):
        own = rank_environment(place, local_rank, num_processes)
        words = [f"{key}={shlex.quote(value)}" for key, value in own.items()]
        lines.append(" ".join([*words, command]))
    return "\n".join(lines)


def check_gpus(num_processes: int) -> None:
    """See that each process gets a GPU, where there are any.

    Raises:
        ConfigError: there are fewer.
    """
    gpus = num_gpus(inherited())
    if 0 < gpus < num_processes:
        raise ConfigError(
            f"num_processes is {num_processes}; this host has {gpus} GPUs: give as many at most "
            "(or set ACCELERATE_USE_CPU=true to run on the CPU)"
        )


def say(text: str, *, as_it_is: bool = False) -> None:
    """Tell people a sentence, or what a rank says itself."""
    print(text if as_it_is else f"preftune launch: {text}", file=sys.stderr, flush=True)
