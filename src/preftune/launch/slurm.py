"""A batch script for Slurm, which requeues its job when the run was interrupted."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from preftune.config.launch import LaunchSlurmConfig
from preftune.errors import ConfigError, Interrupted
from preftune.files import write_atomically
from preftune.launch.inner import inner_command
from preftune.launch.local import say
from preftune.launch.program import Program

_SCRIPT = """\
#!/bin/bash
{directives}

# Slurm speaks to the processes of the job step itself; this shell waits for how they end.
trap : TERM
set -eu
{setup}
PREFTUNE_HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd ' ')
PREFTUNE_PORT=$((20000 + SLURM_JOB_ID % 40000))
export PREFTUNE_HOSTS PREFTUNE_PORT
code=0
srun {srun} bash -c {command} || code=$?
if [ "$code" -eq {interrupted} ]; then
  # A job that was cancelled is left alone.
  if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    echo "interrupted with a checkpoint saved: job $SLURM_JOB_ID is queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


def slurm_script(program: Program, config: LaunchSlurmConfig) -> str:
    """The batch script.

    Args:
        program: what the processes run; by this Python, which every host must have at the same
            path.
        config: what the job asks for.
    """
    directives = [
        f"--job-name={config.job_name}",
        f"--nodes={config.num_hosts}",
        "--ntasks-per-node=1",
        f"--output={config.job_name}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{config.signal_seconds}",
    ]
    srun = ["--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    if config.gpus_per_host:
        directives.append(f"--gpus-per-node={config.gpus_per_host}")
    if config.cpus_per_host is not None:
        directives.append(f"--cpus-per-task={config.cpus_per_host}")
        srun.append(f"--cpus-per-task={config.cpus_per_host}")  # which srun does not take over
    if config.time is not None:
        directives.append(f"--time={config.time}")
    directives += config.sbatch_options or []
    command = inner_command(
        program,
        config,
        config,
        [sys.executable, "-m", "preftune"],
        hosts="$PREFTUNE_HOSTS",
        host_rank="$SLURM_NODEID",
        port="$PREFTUNE_PORT",
    )
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        setup="\n".join(config.setup or []),
        srun=shlex.join(srun),
        command=shlex.quote(f"exec {command}"),
        interrupted=Interrupted.exit_code,
    )


def launch_slurm(program: Program, config: LaunchSlurmConfig) -> int:
    """Write the batch script and, unless told otherwise, submit it.

    Args:
        program: what the processes run.
        config: what the job asks for.

    Returns:
        0: the job is queued.

    Raises:
        ConfigError: there is no sbatch here, or it refuses the job.
    """
    if config.submit:
        check_sbatch("give --submit false to only write the script")
    script = Path(config.script)
    write_atomically(script, slurm_script(program, config))
    say(f"wrote {script}")
    if not config.submit:
        return 0
    print(submit(config.script), end="", flush=True)
    return 0


def check_sbatch(otherwise: str) -> None:
    """See that jobs can be submitted here.

    Args:
        otherwise: what to do where they cannot.

    Raises:
        ConfigError: there is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not installed here, or not in PATH: run this on a login node of the "
            f"cluster, or {otherwise}"
        )


def submit(script: str) -> str:
    """Hand a batch script to sbatch; gives what it says.

    Args:
        script: its path.

    Raises:
        ConfigError: it refuses the job.
    """
    result = subprocess.run(["sbatch", script], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ConfigError(f"sbatch refuses {script}: {result.stderr.strip()}")
    return result.stdout


def describe_slurm(program: Program, config: LaunchSlurmConfig) -> str:
    """The script, and what would be done with it."""
    done = f"\n# {shlex.join(['sbatch', config.script])}" if config.submit else ""
    return f"# {config.script}\n{slurm_script(program, config)}".rstrip("\n") + done
