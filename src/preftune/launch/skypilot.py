"""A task file for SkyPilot."""

import shlex
from typing import Any

import yaml

from preftune.config.launch import LaunchSkypilotConfig
from preftune.errors import Interrupted
from preftune.launch.inner import inner_command, write_for
from preftune.launch.program import Program


def skypilot_task(program: Program, config: LaunchSkypilotConfig) -> dict[str, Any]:
    """The task.

    Args:
        program: what the processes run.
        config: what the task asks for.
    """
    resources: dict[str, Any] = {
        # Of sky jobs launch: interrupted with a checkpoint saved, so the same command goes on.
        "job_recovery": {"recover_on_exit_codes": [Interrupted.exit_code]},
    }
    if config.accelerator is not None:
        resources["accelerators"] = f"{config.accelerator}:{config.gpus_per_host}"
    if config.cpus_per_host is not None:
        resources["cpus"] = f"{config.cpus_per_host}+"
    if config.infra is not None:
        resources["infra"] = config.infra
    if config.use_spot:
        resources["use_spot"] = True
    task: dict[str, Any] = {"name": config.job_name, "num_nodes": config.num_hosts}
    if config.workdir is not None:
        task["workdir"] = config.workdir
    task["resources"] = resources
    if config.setup:
        task["setup"] = " && ".join(config.setup)
    command = inner_command(
        program,
        config,
        config,
        ["preftune"],
        hosts="$SKYPILOT_NODE_IPS",  # a word a host
        host_rank='"$SKYPILOT_NODE_RANK"',
    )
    task["run"] = command
    return task


def describe_skypilot(program: Program, config: LaunchSkypilotConfig) -> str:
    """The task, and what to do with it."""
    text = yaml.safe_dump(skypilot_task(program, config), sort_keys=False, width=float("inf"))
    return f"# {_start(config)}\n{text}".rstrip("\n")


def write_skypilot(program: Program, config: LaunchSkypilotConfig) -> int:
    """Write the task file; gives the exit code."""
    return write_for(_start(config), config.task, describe_skypilot(program, config))


def _start(config: LaunchSkypilotConfig) -> str:
    return f"sky jobs launch {shlex.quote(config.task)}"
