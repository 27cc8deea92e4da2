"""Evaluation jobs: what runs after training, or by `preftune evaluate`."""

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from preftune.config.problem import Problem, count, listed, sbatch_option_problems
from preftune.config.section import Section

JobName = Literal["lm_eval", "command", "slurm", "beaker"]
RUNS_TASKS: tuple[JobName, ...] = ("lm_eval", "slurm", "beaker")
"""Jobs that run lm-evaluation-harness: here, in a job of Slurm, on Beaker."""
OF_HARNESS = (
    "eval_tasks",
    "eval_limit",
    "eval_batch_size",
    "eval_num_fewshot",
    "eval_chat_template",
    "eval_dtype",
)
"""Options that jobs which run the harness read, here or elsewhere."""
OF_BEAKER = (
    "beaker_image",
    "beaker_workspace",
    "beaker_budget",
    "beaker_cluster",
    "beaker_priority",
    "beaker_gpus",
    "beaker_hf_secret",
)
YAML_OPTIONS = ("eval_tasks",)
"""Lists whose words may be paths of .yaml files."""
PLACES = ("model", "base", "output", "run")
"""What `eval_command` may name in braces."""


@dataclass(kw_only=True)
class JobsConfig(Section):
    """Evaluation jobs, on the trained model and on the one that it was trained from."""

    eval_jobs: list[JobName] | None = None
    """What to run when training is finished: lm_eval, lm-evaluation-harness on this machine (the
    extra eval); command, a program of yours (`eval_command`); slurm, the harness in a job of Slurm;
    beaker, the harness on Beaker, from the Hub (needs `push_to_hub`). Unset: nothing."""

    eval_tasks: list[str] | None = None
    """Tasks of the harness: names that it knows, or paths of .yaml files."""

    eval_limit: int | None = None
    """Only the first this many rows of each task, 1 or more. Unset: all."""

    eval_batch_size: int | Literal["auto"] | None = None
    """Rows of a forward in the harness, 1 or more; auto: as many as fit. Unset: 1. Held-out pairs
    during training have `per_device_eval_batch_size`."""

    eval_num_fewshot: int | None = None
    """Worked examples in front of each question, 0 or more. Unset: as each task says."""

    eval_chat_template: bool | None = None
    """Put the tasks' questions to the model through its chat template. Unset: false, as the harness
    does; models that were trained to chat need true for tasks that they answer in words."""

    eval_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """How the harness loads weights, of both models. Unset: as the files of the trained one have
    them."""

    eval_command: str | None = None
    """A command line for the job command, such as "mytool --model {model} --out {output}": split
    into words as a shell would, and run without one. In braces: model, the model's folder or name;
    output, a folder for what it writes; run, the run's folder; base, what was trained from. Without
    base it runs once for each of the two models."""

    eval_slurm_options: list[str] | None = None
    """Options of sbatch for the job slurm, such as "['--partition=gpu', '--gpus=1']"."""

    beaker_image: str | None = None
    """Image with preftune[eval]: of Beaker, or docker:NAME. The job beaker needs one."""

    beaker_workspace: str | None = None
    """Workspace of the experiment. Unset: your default one."""

    beaker_budget: str | None = None
    """Budget of the experiment. Unset: the workspace's."""

    beaker_cluster: list[str] | None = None
    """Clusters that it may run on. Unset: any."""

    beaker_priority: Literal["low", "normal", "high", "urgent"] | None = None
    """Priority of its task. Unset: normal."""

    beaker_gpus: int | None = None
    """GPUs that it asks for, 0 or more. Unset: 1."""

    beaker_hf_secret: str | None = None
    """Name of the workspace's secret that holds a token of the Hub. Unset: none, which reads public
    models only."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        jobs = self.eval_jobs or []
        found = count("eval_limit", self.eval_limit)
        found += count("eval_num_fewshot", self.eval_num_fewshot, least=0)
        found += count("beaker_gpus", self.beaker_gpus, least=0)
        if isinstance(self.eval_batch_size, int):
            found += count("eval_batch_size", self.eval_batch_size)
        if self.eval_jobs == []:
            message = "it must name at least one job; for none, leave it out"
            found.append(Problem("eval_jobs", [], message))
        if len(set(jobs)) < len(jobs):
            found.append(Problem("eval_jobs", jobs, "a job is named twice; keep one"))
        if {"lm_eval", "slurm"} <= set(jobs):
            message = "slurm runs the same tasks in its job: leave lm_eval or slurm out"
            found.append(Problem("eval_jobs", jobs, message))
        found += _unread_problems(self, jobs)
        return found + _needed_problems(self, jobs)

    @property
    def harness_options(self) -> list[str]:
        """The options of the harness that are given, as words of `preftune evaluate`."""
        words = []
        for key in OF_HARNESS:
            value = getattr(self, key)
            if value is not None:
                values = value if isinstance(value, list) else [_plain(value)]
                words += [f"--{key}", *map(str, values)]
        return words


def _plain(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


def _unread_problems(section: JobsConfig, jobs: Collection[JobName]) -> list[Problem]:
    """Of options whose job is not asked for."""
    readers: dict[tuple[JobName, ...], tuple[str, ...]] = {
        RUNS_TASKS: OF_HARNESS,
        ("command",): ("eval_command",),
        ("slurm",): ("eval_slurm_options",),
        ("beaker",): OF_BEAKER,
    }
    return [
        Problem(
            key,
            value,
            f"nothing reads it: add {listed(names)} to eval_jobs, or leave it out",
            ("eval_jobs",),
        )
        for names, keys in readers.items()
        if not set(names) & set(jobs)
        for key in keys
        if (value := getattr(section, key)) is not None
    ]


def _needed_problems(section: JobsConfig, jobs: Collection[JobName]) -> list[Problem]:
    """Of what a job lacks, or cannot take."""
    found, others = [], ("eval_jobs",)
    asked = [name for name in RUNS_TASKS if name in jobs]
    if asked and not section.eval_tasks:
        message = f"{listed(asked)} needs tasks: names that lm-evaluation-harness knows, or .yaml "
        found.append(Problem("eval_tasks", section.eval_tasks, message + "files", others))
    tasks = section.eval_tasks or []
    if len(set(tasks)) < len(tasks):
        found.append(Problem("eval_tasks", tasks, "a task is named twice; keep one"))
    for task in tasks:
        if "," in task or not task.strip():
            message = f"{task!r} is no name of a task; separate names by spaces"
            found.append(Problem("eval_tasks", tasks, message))
    if "command" in jobs:
        found += _command_problems(section.eval_command)
    found += sbatch_option_problems("eval_slurm_options", section.eval_slurm_options)
    if "beaker" in jobs:
        if section.beaker_image is None:
            message = "the job beaker needs an image that has preftune[eval]"
            found.append(Problem("beaker_image", None, message, others))
        local = [task for task in tasks if task.endswith(".yaml")]
        if local:
            message = f"{local[0]} is a file here, which the job beaker cannot read: give names "
            found.append(Problem("eval_tasks", tasks, message + "that the harness knows", others))
    return found


def _command_problems(command: str | None) -> list[Problem]:
    key = "eval_command"
    if not command or not command.strip():
        message = 'the job command needs one, such as "mytool --model {model} --out {output}"'
        return [Problem(key, command, message, ("eval_jobs",))]
    try:
        words = shlex.split(command)
        places = [name for word in words for _, name, _, _ in Formatter().parse(word) if name]
        "".join(words).format(**dict.fromkeys(PLACES, ""))
    except KeyError as error:
        message = f"{{{error.args[0]}}} is no place; they are {', '.join(PLACES)} (a brace as text "
        return [Problem(key, command, message + "is written twice)")]
    except (ValueError, IndexError, AttributeError) as error:
        message = f"it cannot be read as a command line ({error})"
        return [Problem(key, command, message)]
    if "model" not in places:
        return [Problem(key, command, "it must say where the model goes: {model}")]
    return []
