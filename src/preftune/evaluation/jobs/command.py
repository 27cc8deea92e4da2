"""Any program as a job: its command line from a template, its results from a JSON file.

What it writes to `{output}/results.json` is read:

    {"my_task": {"accuracy": 0.7, "score": {"value": 3.1, "stderr": 0.2}}}
"""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError
from preftune.evaluation.jobs.calls import JobFailed
from preftune.evaluation.jobs.scores import Score
from preftune.evaluation.jobs.subject import Subject

RESULTS = "results.json"


def compares(template: str) -> bool:
    """Whether one call sees both models."""
    return "{base}" in template


def check_command(template: str) -> None:
    """See that the program is there.

    Raises:
        ConfigError: it is not.
    """
    program = shlex.split(template)[0]
    if "{" not in program and shutil.which(program) is None:
        raise ConfigError(
            f"eval_command starts with {program!r}, which is no program here (in PATH, or by its "
            "path); correct it"
        )


def command_line(
    template: str, subject: Subject, base: Subject | None, output: Path, run: Path | None
) -> list[str]:
    """The words of the template, with its places filled.

    Args:
        template: `eval_command`.
        subject: the model; of an adapter its own folder.
        base: what it was trained from.
        output: a folder for what the program writes.
        run: the run's folder.

    Raises:
        ConfigError: the template names what there is not.
    """
    places = {"model": subject.name, "output": str(output)}
    if base is not None:
        places["base"] = base.name
    if run is not None:
        places["run"] = str(run)
    try:
        return [word.format(**places) for word in shlex.split(template)]
    except KeyError as error:
        what = "no model to compare with; give --eval_base" if error.args[0] == "base" else "no run"
        raise ConfigError(f"eval_command names {{{error.args[0]}}}, and there is {what}") from error


def read_results(output: Path) -> list[Score]:
    """The numbers that the program wrote; none where it wrote no results.json.

    Raises:
        JobFailed: the file cannot be read.
    """
    file = output / RESULTS
    if not file.is_file():
        return []
    try:
        held = json.loads(file.read_text("utf-8"))
        return [
            score for task, metrics in held.items() for score in _of_task(task, metrics, str(file))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobFailed(
            f"{file} cannot be read ({type(error).__name__}: {error}); it must be "
            '{"task": {"metric": number, or {"value": number, "stderr": number}}}'
        ) from error


def _of_task(task: str, metrics: dict[str, Any], file: str) -> Iterator[Score]:
    for metric, found in metrics.items():
        held = found if isinstance(found, dict) else {"value": found}
        stderr = held.get("stderr")
        value = float(held["value"])
        yield Score(task, metric, value, None if stderr is None else float(stderr), file)
