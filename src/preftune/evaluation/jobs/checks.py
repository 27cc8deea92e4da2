"""What evaluation jobs need, looked at before anything runs."""

from preftune.config.jobs import JobsConfig
from preftune.errors import Findings
from preftune.evaluation.jobs.beaker import check_beaker
from preftune.evaluation.jobs.command import check_command
from preftune.evaluation.jobs.lm_eval import check_harness
from preftune.launch.slurm import check_sbatch


def check_jobs(config: JobsConfig, *, ask_harness: bool, submits: bool = True) -> None:
    """See that packages, programs, tasks and credentials are there.

    Args:
        config: which jobs.
        ask_harness: whether to start the harness to ask for names of tasks.
        submits: whether jobs shall be handed to Slurm and Beaker.

    Raises:
        ConfigError: with everything that is not.
    """
    jobs, findings = config.eval_jobs or [], Findings()
    if {"lm_eval", "slurm"} & set(jobs):
        with findings:  # a job of Slurm runs by this Python
            check_harness(config.eval_tasks or [], ask=ask_harness)
    if "command" in jobs:
        with findings:
            check_command(str(config.eval_command))
    if "slurm" in jobs and submits:
        with findings:
            check_sbatch("leave slurm out of eval_jobs")
    if "beaker" in jobs:
        with findings:
            check_beaker(submits=submits)
    findings.raise_all()
