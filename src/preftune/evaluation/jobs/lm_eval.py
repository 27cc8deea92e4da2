"""lm-evaluation-harness: its command line in a process of its own, its results file, its tasks.

Source: https://github.com/EleutherAI/lm-evaluation-harness, version 0.4.9 and later.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash
import yaml

from preftune.config.jobs import JobsConfig
from preftune.errors import ConfigError, absent_package
from preftune.evaluation.jobs.calls import JobFailed
from preftune.evaluation.jobs.scores import Score
from preftune.evaluation.jobs.subject import Subject
from preftune.launch.environment import inherited

_ABOUT = ("name", "alias", "sample_len", "sample_count")
"""Keys of a task's results that are no metrics."""
_PATTERN = re.compile(r"[*?\[]")


def check_harness(tasks: Sequence[str], *, ask: bool) -> None:
    """See that the harness is installed, and that it has the tasks.

    Args:
        tasks: names, or paths of .yaml files.
        ask: whether to ask the harness for the names, which starts it (some ten seconds).

    Raises:
        ConfigError: it is not installed, or a task is not there.
    """
    if find_spec("lm_eval") is None:
        asked, otherwise = "the job lm_eval is asked for", "leave it out of eval_jobs"
        raise absent_package(asked, "lm-eval", "eval", otherwise)
    problems = []
    for task in tasks:
        if task.endswith(".yaml"):
            try:
                task_name(task)
            except ValueError as error:
                problems.append(f"eval_tasks: {task}: {error}")
    names = [task for task in tasks if not task.endswith(".yaml") and not _PATTERN.search(task)]
    if ask and names:
        problems += _unknown(names)
    if problems:
        raise ConfigError(problems)


def _unknown(names: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "lm_eval", "validate", "--tasks", ",".join(names)]
    result = subprocess.run(
        words, env=inherited(), capture_output=True, text=True, check=False, timeout=600
    )
    missing = re.search(r"^Tasks not found: (.+)$", result.stdout, re.MULTILINE)
    if missing is None:
        return []  # any other trouble is told by the job itself
    return [
        f"eval_tasks: {missing[1]}: lm-evaluation-harness does not know that; `lm-eval ls tasks` "
        "lists what it knows, and a task of your own is given by the path of its .yaml file"
    ]


class _Reader(yaml.SafeLoader):
    """Takes the harness's tags, such as !function, as plain text."""


_Reader.add_multi_constructor("!", lambda loader, suffix, node: getattr(node, "value", None))


def _read_task(path: str) -> Mapping[str, Any]:
    try:
        held = yaml.load(Path(path).expanduser().read_text("utf-8"), _Reader)
    except OSError as error:
        raise ValueError(f"{error.strerror}; correct the path") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML ({error})") from error
    if not isinstance(held, dict):
        raise ValueError("it describes no task: a mapping with `task` is due")
    return held


def task_name(path: str) -> str:
    """The name that a .yaml file gives its task or group.

    Raises:
        ValueError: it is not there, or describes no task; says what to do.
    """
    held = _read_task(path)
    for key in ("task", "group"):
        if isinstance(held.get(key), str):
            return held[key]
    raise ValueError("it has no `task`, the name that its results get")


def task_digests(tasks: Sequence[str]) -> dict[str, str]:
    """What each task is, by content: of a name the harness's version, of a file all that it reads.

    Args:
        tasks: names, or paths of .yaml files.
    """
    return {task: _file_digest(task) if task.endswith(".yaml") else "" for task in tasks}


def _file_digest(path: str) -> str:
    """Of a task's file, of what lies beside it to include or call, and of the data it names."""
    file = Path(path).expanduser()
    files = {p for pattern in ("*.yaml", "*.py") for p in file.parent.glob(pattern)}
    for text in _texts(_read_task(path)):
        named = [Path(text).expanduser(), file.parent / text]
        files |= {p for p in named if len(text) < 1024 and p.is_file()}
    digest = xxhash.xxh3_128(file.name.encode())
    for one in sorted(files):
        digest.update(f"|{one.name}|".encode())
        digest.update(xxhash.xxh3_128_digest(one.read_bytes()))
    return digest.hexdigest()


def _texts(held: Any) -> Iterator[str]:
    if isinstance(held, str):
        yield held
    elif isinstance(held, dict | list):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _texts(value)


def settings(subject: Subject, config: JobsConfig, dtype: str | None) -> dict[str, Any]:
    """What the numbers depend on besides the tasks.

    Args:
        subject: the model.
        config: how to evaluate.
        dtype: see `harness_command`.
    """
    try:
        installed = version("lm-eval")
    except PackageNotFoundError:  # a copy that was not installed by pip
        installed = "unknown"
    return {
        "model": subject.digest,
        "dtype": dtype,
        "limit": config.eval_limit,
        "batch_size": config.eval_batch_size,
        "num_fewshot": config.eval_num_fewshot,
        "chat_template": bool(config.eval_chat_template),
        "lm_eval": installed,
    }


def harness_command(
    subject: Subject,
    tasks: Sequence[str],
    config: JobsConfig,
    dtype: str | None,
    output: Path,
    *,
    trust_remote_code: bool,
) -> list[str]:
    """The harness's command line.

    Args:
        subject: the model.
        tasks: names, or paths of .yaml files.
        config: how to evaluate.
        dtype: how weights are loaded; None: as the files have them.
        output: the folder for results.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: a path holds what the harness takes for its own.
    """
    words = [sys.executable, "-m", "lm_eval", "--model", "hf"]
    words += ["--model_args", _model_arguments(subject, dtype)]
    words += ["--tasks", ",".join(_absolute(task) for task in tasks)]
    words += ["--output_path", str(output), "--batch_size", str(config.eval_batch_size or 1)]
    if config.eval_limit is not None:
        words += ["--limit", str(config.eval_limit)]
    if config.eval_num_fewshot is not None:
        words += ["--num_fewshot", str(config.eval_num_fewshot)]
    if config.eval_chat_template:
        words.append("--apply_chat_template")
    if trust_remote_code:
        words.append("--trust_remote_code")
    return words


def _absolute(task: str) -> str:
    return str(Path(task).expanduser().absolute()) if task.endswith(".yaml") else task


def _model_arguments(subject: Subject, dtype: str | None) -> str:
    values: dict[str, str | None] = {"pretrained": subject.model}
    path = Path(subject.model).expanduser()
    if path.is_file():  # a GGUF file
        values = {"pretrained": str(path.parent), "gguf_file": path.name}
    elif path.is_dir():
        values["pretrained"] = str(path)
    values |= {"revision": subject.revision, "peft": subject.adapter}
    values |= {"tokenizer": subject.tokenizer, "dtype": dtype or "auto"}
    for key, value in values.items():
        if value is not None and re.search(r"[,=]", value):
            raise ConfigError(
                f"{key} is {value!r}, and lm-evaluation-harness takes , and = for its own; rename "
                "the folder"
            )
    return ",".join(f"{key}={value}" for key, value in values.items() if value is not None)


def read_scores(output: Path) -> list[Score]:
    """The numbers of a results file of the harness, as they are.

    Args:
        output: the folder that it was given.

    Raises:
        JobFailed: there is no such file, or none that can be read.
    """
    files = sorted(output.glob("**/results_*.json"), key=lambda file: file.name)
    if not files:
        raise JobFailed(f"lm-evaluation-harness ended well and wrote no results to {output}")
    try:
        held = json.loads(files[-1].read_text("utf-8"))
        higher = held.get("higher_is_better", {})
        return [
            score
            for task, values in held["results"].items()
            for score in _of_task(task, values, higher.get(task) or {}, str(files[-1]))
        ]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise JobFailed(f"{files[-1]} cannot be read ({type(error).__name__}: {error})") from error


def _of_task(
    task: str, values: Mapping[str, Any], higher: Mapping[str, bool], file: str
) -> Iterator[Score]:
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _ABOUT or metric.endswith("_stderr") or not is_number:
            continue
        stderr = values.get(f"{metric}_stderr,{kind}")
        named = metric if kind in ("", "none") else f"{metric} ({kind})"
        known = stderr if isinstance(stderr, int | float) else None  # it may be "N/A"
        yield Score(task, named, value, known, file, higher.get(metric))
