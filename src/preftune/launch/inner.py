"""What jobs share: the command that runs on each host, and the file that describes the job."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from preftune.config.launch import JobSection, ProcessesSection
from preftune.files import write_atomically
from preftune.launch.local import say
from preftune.launch.program import Program


def inner_command(
    program: Program,
    section: ProcessesSection,
    job: JobSection,
    preftune: Sequence[str],
    *,
    hosts: str,
    host_rank: str,
    port: str | None = None,
) -> str:
    """What each host of a job runs, as a line for a shell.

    Args:
        program: what the processes run.
        section: how many processes, and what to do when one is lost.
        job: on how many hosts.
        preftune: how preftune is called there.
        hosts: what the shell expands to the hosts' names, as several words.
        host_rank: what the shell expands to this host's number.
        port: what the shell expands to the port; None: the default.
    """
    own = f"--num_processes {section.processes} --max_restarts {section.max_restarts}"
    own += f" --end_seconds {section.end_seconds:g}"
    way = "local"
    if job.num_hosts > 1:
        way = f"hosts --hosts {hosts} --host_rank {host_rank}"
        way += f" --port {port}" if port else ""
    return f"{shlex.join(preftune)} launch {way} {own} -- {shlex.join(program.words)}"


def write_for(start: str, path: str, text: str) -> int:
    """Write the file of a job that people start themselves.

    Args:
        start: the command that starts it.
        path: of the file.
        text: of the file.

    Returns:
        The exit code, 0.
    """
    write_atomically(Path(path), f"{text}\n")
    say(f"wrote {path}; start it with: {start}")
    return 0
