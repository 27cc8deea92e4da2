"""`preftune evaluate`: evaluation jobs on a trained model and on what it was trained from.

OUTPUT/results.json           every number of both models; see `evaluation.jobs.scores`
       about.json             which model the folder is about
       lm_eval|command/       a folder for each call: what was asked, log, raw output
       slurm|beaker/          what was submitted, and the answer
       win_rate.json, judge/  see `recipes.judge`
"""

import gc
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import assert_never

import torch

from preftune.config.evaluate import EvaluateConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.jobs import JobName, JobsConfig
from preftune.config.parser import parse_config
from preftune.config.paths import cache_root
from preftune.errors import CheckpointError, ConfigError, PreftuneError
from preftune.evaluation.jobs import beaker, command, lm_eval
from preftune.evaluation.jobs.calls import Call, JobFailed, copied, finished
from preftune.evaluation.jobs.checks import check_jobs
from preftune.evaluation.jobs.scores import (
    Comparison,
    Score,
    compare,
    read_results,
    table,
    write_results,
)
from preftune.evaluation.jobs.slurm import slurm_script
from preftune.evaluation.jobs.subject import Subject
from preftune.evaluation.judging.kept import digest
from preftune.files import hold_alone, write_atomically
from preftune.launch.slurm import submit
from preftune.model.load import check_model_files
from preftune.redaction import redacted
from preftune.report.page import try_report
from preftune.tracking.progress import ProgressDisplay
from preftune.training.run_folder import RunFolder, check_writable

RESULTS, ABOUT = "results.json", "about.json"
_SIDES = ("base", "trained")


@dataclass(frozen=True)
class Target:
    """What is evaluated, and where results go."""

    name: str
    """As the user wrote it."""
    trained: Subject
    base: Subject | None
    output: Path
    run: RunFolder | None = None
    run_config: ExperimentConfig | None = None
    hub_repo_id: str | None = None
    hub_revision: str | None = None

    def subject(self, side: str) -> Subject | None:
        """One of the two models."""
        return self.base if side == "base" else self.trained


def evaluate(config: EvaluateConfig, name: str) -> str:
    """Run evaluation jobs, and compare answers; what has run is not run again.

    Args:
        config: what to run.
        name: a run's folder, a model's folder, or a name on the Hub.

    Returns:
        The numbers, as a table; with `dry_run` what would run.

    Raises:
        PreftuneError: something cannot run; JobFailed after all others have.
    """
    check_jobs(config, ask_harness=False, submits=not config.dry_run)
    target = _target(config, name)
    display = ProgressDisplay(config.progress)
    jobs = Jobs(config, target, display, config.trust_remote_code, config.cache_dir)
    jobs.check()
    if config.dry_run:
        return jobs.describe()
    with_judge: Callable[[], str] | None = None
    if config.judge is not None:
        from preftune.recipes.judge import prepare_judge

        with_judge = prepare_judge(config, target, display)
    lock = _hold(target)
    try:
        text, failures = jobs.run()
        if with_judge is not None:
            text = "\n\n".join(filter(None, [text, with_judge()]))
        if target.run is not None:
            try_report(target.run.root, display.say)
    finally:
        os.close(lock)
    if failures:
        if text:
            print(text, flush=True)
        raise JobFailed(failures)
    return text


def evaluate_trained(config: ExperimentConfig, folder: RunFolder) -> None:
    """Run the evaluation jobs of a run that is finished; it stays so whatever becomes of them.

    Args:
        config: of the run.
        folder: of the run.
    """
    display = ProgressDisplay(config.progress)
    gc.collect()  # the jobs need the memory
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    again = f"run `preftune evaluate {folder.root}` with the same eval_ options to try again"
    try:
        check_jobs(config, ask_harness=False)
        target = of_run(folder, config)
        lock = _hold(target)
        try:
            jobs = Jobs(config, target, display, config.trust_remote_code, config.cache_dir)
            jobs.check()
            text, failures = jobs.run()
            try_report(folder.root, display.say)
        finally:
            os.close(lock)
    except (PreftuneError, OSError) as error:
        text, failures = "", [str(error)]
    if text:
        display.say(text)
    for failure in failures:
        display.say(f"evaluation failed: {failure}. The model in {folder.final} is whole; {again}")


def of_run(folder: RunFolder, config: ExperimentConfig) -> Target:
    """The two models of a finished run.

    Args:
        folder: of the run.
        config: of the run.

    Raises:
        CheckpointError: it is not finished.
    """
    manifest = folder.read_manifest()
    if manifest.get("status") != "finished" or not folder.final.is_dir():
        raise CheckpointError(
            f"the run in {folder.root} is {manifest.get('status')}, so there is no final/ to "
            "evaluate; let it finish, or give a model (preftune export writes one)"
        )
    final, about = str(folder.final), manifest.get("model") or {}
    start = Subject(
        str(config.model_name_or_path),
        about.get("commit"),
        config.adapter_name_or_path if config.use_lora else None,
        about.get("adapter_commit"),
        # With its chat template: both models shall read the same tokens.
        tokenizer=final,
    )
    trained = Subject(final)
    if (folder.final / "adapter_config.json").is_file():
        trained = replace(start, adapter=final, adapter_revision=None)
    return Target(
        str(folder.root),
        trained,
        start,
        folder.root / "evaluation",
        folder,
        config,
        config.hub_repo_id,
        config.hub_revision,
    )


def _target(config: EvaluateConfig, name: str) -> Target:
    """What the command's argument stands for."""
    folder = RunFolder(Path(name).expanduser())
    if folder.manifest.is_file():
        if config.model_revision is not None:
            raise ConfigError(f"model_revision is given, and {name} is a run; leave it out")
        target = of_run(folder, parse_config(ExperimentConfig, [str(folder.config)]))
    else:
        trained = Subject.named(name, config.model_revision, "MODEL")
        base = replace(trained, adapter=None) if trained.adapter is not None else None
        if config.output is None and not config.dry_run:
            raise ConfigError(f"{name} is no run of preftune, so --output must say where to write")
        on_hub = None if Path(name).expanduser().exists() else name
        output = Path(config.output or "evaluation")
        target = Target(name, trained, base, output, None, None, on_hub, config.model_revision)
    if config.eval_base is not None:
        target = replace(target, base=Subject.named(config.eval_base, None, "eval_base"))
    if config.output is not None:
        target = replace(target, output=Path(config.output).expanduser())
    if config.hub_repo_id is not None:
        target = replace(target, hub_repo_id=config.hub_repo_id, hub_revision=None)
    for subject in (target.base, target.trained):
        if subject is not None:
            check_model_files(subject.model, "eval_base" if subject is target.base else "MODEL")
    return replace(target, output=target.output.absolute())


def _hold(target: Target) -> int:
    """Make the folder of results and lock it, and see that it is about this model."""
    check_writable("output", target.output)
    target.output.mkdir(parents=True, exist_ok=True)
    lock = hold_alone(target.output)
    about, file = {"trained": target.trained.digest}, target.output / ABOUT
    try:
        before = json.loads(file.read_text("utf-8")) if file.is_file() else about
    except ValueError:
        before = {}
    if before != about:
        os.close(lock)
        raise CheckpointError(
            f"{target.output} holds results of another model; give another --output, or delete it"
        )
    write_atomically(file, json.dumps(about) + "\n")
    return lock


@dataclass(frozen=True)
class Jobs:
    """The evaluation jobs of one model."""

    config: JobsConfig
    target: Target
    display: ProgressDisplay
    trust_remote_code: bool
    cache_dir: str | None

    @property
    def _cache(self) -> Path:
        return cache_root(self.cache_dir) / "evaluation"

    @property
    def _dtype(self) -> str | None:
        """How weights are loaded, of both models."""
        trained = self.target.trained
        stored = trained.stored_dtype if trained.adapter is None else None
        return self.config.eval_dtype or stored

    def check(self) -> None:
        """See that the models suit the jobs.

        Raises:
            PreftuneError: they do not.
        """
        jobs = self.config.eval_jobs or []
        for subject in filter(None, map(self.target.subject, _SIDES)):
            if "lm_eval" in jobs or "slurm" in jobs:
                subject.refuse_quantized()
                self._harness_words(subject, [], self.target.output)
        if "command" in jobs:
            self._command_words(self.target.trained, self.target.output)

    def run(self) -> tuple[str, list[str]]:
        """Run what has not run.

        Returns:
            The numbers as a table, and what failed.
        """
        jobs, path = self.config.eval_jobs or [], self.target.output / RESULTS
        rows = [row for row in read_results(path) if row.job not in jobs]
        failures: list[str] = []
        for name in jobs:
            rows += self._run(name, failures)
        if rows:
            write_results(path, rows)
            self.display.say(f"saved {path}")
        return table(rows) if rows else "", failures

    def _run(self, name: JobName, failures: list[str]) -> list[Comparison]:
        match name:
            case "lm_eval":
                return self._compared(name, self._run_harness, self._harness_scores, failures)
            case "command":
                return self._compared(name, self._run_command, self._command_scores, failures)
            case "slurm" | "beaker":
                with _collecting(failures, name):
                    self._submit(name)
                return []
            case _:
                assert_never(name)

    def _compared(
        self,
        name: str,
        run: Callable[[str, Subject], None],
        scores: Callable[[str, Subject], list[Score]],
        failures: list[str],
    ) -> list[Comparison]:
        found: dict[str, list[Score]] = {side: [] for side in _SIDES}
        for side in _SIDES:
            subject = self.target.subject(side)
            if subject is not None:
                where = f"{name} of the {side} model"
                with _collecting(failures, where):
                    run(side, subject)
                with _collecting(failures, where):  # what is finished counts all the same
                    found[side] = scores(side, subject)
        return compare(name, found["base"], found["trained"])

    # ---------------------------------------------------------------- here

    def _run_harness(self, side: str, subject: Subject) -> None:
        """See that the harness has run on one model; for the base the cache may have it."""
        root = self.target.output / "lm_eval"
        key = lm_eval.settings(subject, self.config, self._dtype)
        wanted = lm_eval.task_digests(self.config.eval_tasks or [])
        if side == "base":
            for call in finished(self._cache, side, key):
                if call.tasks.items() & wanted.items():
                    copied(call, root)
        known = {item for call in finished(root, side, key) for item in call.tasks.items()}
        missing = dict(item for item in wanted.items() if item not in known)
        if not missing:
            return
        call = Call.of(root, side, key, missing)
        self._say_call("lm_eval", side, subject, list(missing), call)
        call.run(self._harness_words(subject, list(missing), call.output))
        lm_eval.read_scores(call.output)
        call.finish()
        if side == "base":
            self._cache.mkdir(parents=True, exist_ok=True)
            copied(call, self._cache)

    def _harness_scores(self, side: str, subject: Subject) -> list[Score]:
        """All numbers of one model with these settings."""
        key = lm_eval.settings(subject, self.config, self._dtype)
        wanted = lm_eval.task_digests(self.config.eval_tasks or [])
        calls = finished(self.target.output / "lm_eval", side, key)
        # A task that was changed and changed back: what is asked for now comes last, and counts.
        calls.sort(key=lambda call: bool(call.tasks.items() & wanted.items()))
        return [score for call in calls for score in lm_eval.read_scores(call.output)]

    def _harness_words(self, subject: Subject, tasks: Sequence[str], output: Path) -> list[str]:
        return lm_eval.harness_command(
            subject,
            tasks,
            self.config,
            self._dtype,
            output,
            trust_remote_code=self.trust_remote_code,
        )

    def _command_call(self, side: str, subject: Subject) -> Call | None:
        """The call of the user's program for one model; None where that of the other sees both."""
        template = str(self.config.eval_command)
        key = {"model": subject.digest, "command": template}
        if command.compares(template):
            if side == "base" or self.target.base is None:
                return None
            key["base"] = self.target.base.digest
        return Call.of(self.target.output / "command", side, key, {})

    def _run_command(self, side: str, subject: Subject) -> None:
        call = self._command_call(side, subject)
        if call is not None and not call.is_finished():
            self._say_call("command", side, subject, [], call)
            call.run(self._command_words(subject, call.output))
            command.read_results(call.output)
            call.finish()

    def _command_scores(self, side: str, subject: Subject) -> list[Score]:
        call = self._command_call(side, subject)
        return [] if call is None or not call.is_finished() else command.read_results(call.output)

    def _command_words(self, subject: Subject, output: Path) -> list[str]:
        run = self.target.run
        return command.command_line(
            str(self.config.eval_command),
            subject,
            self.target.base,
            output,
            None if run is None else run.root,
        )

    def _say_call(
        self, job: str, side: str, subject: Subject, tasks: Sequence[str], call: Call
    ) -> None:
        what = f" on {', '.join(tasks)}" if tasks else ""
        self.display.say(f"{job}: {side} model {subject.name}{what}; log in {call.folder}")

    # ---------------------------------------------------------------- elsewhere

    def _submit(self, name: JobName) -> None:
        """Hand the evaluation to Slurm or Beaker, once."""
        words = self._slurm_words() if name == "slurm" else self._beaker_words()
        options = {f.name: getattr(self.config, f.name) for f in fields(JobsConfig)}
        asked = digest(words, options, self.target.trained.digest)[:16]
        folder = self.target.output / name
        note = folder / f"{asked}.json"
        if note.is_file():
            answer = json.loads(note.read_text("utf-8"))["answer"]
            self.display.say(f"{name}: submitted before ({answer}); delete {note} to do so again")
            return
        folder.mkdir(parents=True, exist_ok=True)
        if name == "slurm":
            script = folder / f"{asked}.sbatch"
            write_atomically(script, self._slurm_script(words, folder))
            answer = submit(str(script)).strip()
        else:
            spec = beaker.experiment(words, self.config)
            write_atomically(folder / f"{asked}.yaml", beaker.as_yaml(spec))
            answer = beaker.submit(spec, self.config.beaker_workspace)
        write_atomically(note, json.dumps({"answer": answer, "words": words}) + "\n")
        self.display.say(f"{name}: {answer}")

    def _slurm_words(self) -> list[str]:
        words = [self.target.name, "--eval_jobs", "lm_eval", *self.config.harness_options]
        words += ["--output", str(self.target.output)]
        base = self.target.base
        if base is not None and self.target.run is None:
            words += ["--eval_base", base.name]
        if self.cache_dir is not None:
            words += ["--cache_dir", self.cache_dir]
        if self.trust_remote_code:
            words += ["--trust_remote_code", "true"]
        return words

    def _slurm_script(self, words: Sequence[str], folder: Path) -> str:
        return slurm_script(words, self.config.eval_slurm_options or [], folder / "%j.log")

    def _beaker_words(self) -> list[str]:
        repo, base = self.target.hub_repo_id, self.target.base
        if repo is None:
            raise ConfigError(
                "a job on Beaker reads the model from the Hub, and nothing says where it is there; "
                "give --hub_repo_id, or push the run's model"
            )
        words = [repo, "--eval_jobs", "lm_eval", *self.config.harness_options]
        words += ["--output", beaker.OUTPUT]
        if self.target.hub_revision is not None:
            words += ["--model_revision", self.target.hub_revision]
        if base is not None and base.adapter is None and not Path(base.model).expanduser().exists():
            words += ["--eval_base", base.model]
        if self.trust_remote_code:
            words += ["--trust_remote_code", "true"]
        return words

    # ---------------------------------------------------------------- nowhere

    def describe(self) -> str:
        """What would run or be submitted."""
        return "\n".join(redacted(self._described(name)) for name in self.config.eval_jobs or [])

    def _described(self, name: JobName) -> str:
        if name == "slurm":
            folder = self.target.output / name
            return f"# slurm\n{self._slurm_script(self._slurm_words(), folder)}"
        if name == "beaker":
            return (
                f"# beaker\n{beaker.as_yaml(beaker.experiment(self._beaker_words(), self.config))}"
            )
        lines, output = [], self.target.output / name / "SIDE-DIGEST" / "output"
        for side in _SIDES:
            subject = self.target.subject(side)
            if subject is None:
                continue
            if name == "lm_eval":
                words = self._harness_words(subject, self.config.eval_tasks or [], output)
            elif command.compares(str(self.config.eval_command)) and side == "base":
                continue
            else:
                words = self._command_words(subject, output)
            lines.append(f"# {name}, {side} model\n{shlex.join(words)}")
        return "\n".join(lines)


class _collecting:  # a context manager, as contextlib's are
    """Keeps what goes wrong inside, so that other jobs run."""

    def __init__(self, failures: list[str], where: str) -> None:
        self._failures = failures
        self._where = where

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Take what was raised on purpose."""
        if isinstance(error, PreftuneError):
            self._failures += [f"{self._where}: {problem}" for problem in error.problems]
            return True
        return False
