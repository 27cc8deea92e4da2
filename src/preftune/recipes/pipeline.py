"""`preftune pipeline`: the stages of a file, one after the other; a finished one is not repeated.

    OUTPUT_DIR/sft/, dpo/           runs of `preftune train`, with their checkpoints and final/
    OUTPUT_DIR/merge/model/         the merged model
    OUTPUT_DIR/evaluate/            results.json, and pairs.parquet with the scores of each pair
    OUTPUT_DIR/merge|evaluate/stage.json    what the stage was asked for, written before it begins

What is finished is read off these folders each time.
"""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from preftune.config.composed import ComposedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.merge import MergeConfig
from preftune.config.pipeline import MERGED, RESULTS, SCORES, TOKENIZER, Pipeline, Stage
from preftune.config.score import ScoreConfig
from preftune.distributed.runtime import Runtime, resolve_precision
from preftune.errors import CheckpointError, Findings, PreftuneError
from preftune.files import hold_alone, write_atomically
from preftune.model.adapter_files import adapter_folder
from preftune.model.load import check_model_files
from preftune.recipes.merge import merge
from preftune.recipes.pairs import (
    load_dataset_pairs,
    load_experiment_pairs,
    prepare_tokenizer,
)
from preftune.recipes.preflight import look_at_model
from preftune.recipes.score import score
from preftune.recipes.train import train
from preftune.redaction import redacted_values
from preftune.tracking.progress import ProgressDisplay
from preftune.training.run_folder import RunFolder, check_writable, plan_start

NOTE = "stage.json"
State: TypeAlias = Literal["untouched", "begun", "finished"]


def run_pipeline(pipeline: Pipeline) -> None:
    """Run the stages that are not finished, in order.

    Args:
        pipeline: whose settings are checked.

    Raises:
        PreftuneError: what would stop a stage, before the first weight loads where it can be told;
            a folder holds other work; or a stage was interrupted.
    """
    first = next(stage.training for stage in pipeline.stages if stage.trains)
    runtime = Runtime(
        resolve_precision(first.mixed_precision), first.seed, first.collective_seconds
    )
    display = ProgressDisplay(first.progress, is_main=runtime.is_main)
    lock = runtime.decide(lambda: _hold(pipeline.root))
    try:
        states = runtime.decide(lambda: _look(pipeline))
        total = len(pipeline.stages)
        for number, (stage, state) in enumerate(zip(pipeline.stages, states, strict=True), 1):
            named = f"stage {number} of {total}, {stage.name} ({stage.folder})"
            if state == "finished":
                display.say(f"{named}: finished")
                continue
            display.say(f"{named}: {'goes on' if state == 'begun' else 'begins'}")
            for sentence in _run(stage, runtime):
                display.say(sentence)
            gc.collect()  # the next stage needs the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        if runtime.is_main:
            os.close(lock)


def _hold(root: Path) -> int:
    check_writable("output_dir", root)
    root.mkdir(parents=True, exist_ok=True)
    return hold_alone(root)


# ---------------------------------------------------------------- before anything runs


def _look(pipeline: Pipeline) -> list[State]:
    """The state of each stage, and all that can be found wrong with those that are not finished."""
    findings = Findings()
    states: list[State] = []
    for stage in pipeline.stages:
        states.append("untouched")
        with findings, _named(stage):
            states[-1] = _state(stage)
    findings.raise_all()
    _check_order(pipeline.stages, states)
    pending = [s for s, state in zip(pipeline.stages, states, strict=True) if state != "finished"]
    for stage in pipeline.stages:
        if stage not in pending and any(_starts_from(other, stage) for other in pending):
            with findings, _named(stage):
                _check_output(stage)
    for stage in pending:
        with findings, _named(stage):
            _check_inputs(_standing_in(stage, pipeline, pending))
    findings.raise_all()
    return states


@contextmanager
def _named(stage: Stage) -> Iterator[None]:
    """What goes wrong inside is told with the stage's name."""
    try:
        yield
    except PreftuneError as error:
        raise type(error)(
            [f"stage {stage.name}: {problem}" for problem in error.problems]
        ) from error


def _state(stage: Stage) -> State:
    """Read off the stage's folder.

    Raises:
        CheckpointError: it holds something else, or was made with other settings.
    """
    if stage.trains:
        start = plan_start(stage.training)
        if start.kind == "new" and not RunFolder(stage.folder).manifest.is_file():
            return "untouched"
        return "finished" if start.kind == "finished" else "begun"
    note = stage.folder / NOTE
    output = stage.folder / (MERGED if stage.name == "merge" else RESULTS)
    if not note.is_file():
        if stage.folder.exists() and any(stage.folder.iterdir()):
            raise CheckpointError(
                f"{stage.folder} holds files that are not a pipeline's; nothing there was changed; "
                "give a new output_dir"
            )
        return "untouched"
    if not output.exists():
        return "begun"
    _check_same(stage, note)
    return "finished"


def _check_same(stage: Stage, note: Path) -> None:
    try:
        before = json.loads(note.read_text("utf-8"))["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{note} cannot be read ({error}); delete {stage.folder}") from error
    now = _as_written(stage.config)
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and key not in ("progress", "num_proc", "cache_dir")
    ]
    if changed:
        raise CheckpointError(
            f"{stage.folder} was made with other settings: {'; '.join(changed)}. Nothing was "
            "changed; give the same values, or delete that folder to make it again"
        )


def _check_order(stages: Sequence[Stage], states: Sequence[State]) -> None:
    """Refuse work that started from what is no longer there.

    Raises:
        CheckpointError: a stage has begun, and one before it is not finished.
    """
    index = next((i for i, state in enumerate(states) if state != "finished"), len(states))
    behind = [
        stage
        for stage, state in zip(stages[index + 1 :], states[index + 1 :], strict=True)
        if state != "untouched"
    ]
    if behind:
        named = ", ".join(str(stage.folder) for stage in behind)
        raise CheckpointError(
            f"stage {behind[0].name} has begun, and stage {stages[index].name}, which comes before "
            f"it, is not finished: restore {stages[index].folder}, or delete {named} to make it "
            "again"
        )


def _starts_from(stage: Stage, before: Stage) -> bool:
    inside = f"{before.folder}{os.sep}"
    return any(str(value).startswith(inside) for value in stage.config.to_dict().values())


def _check_output(stage: Stage) -> None:
    """See that what a finished stage left is still whole."""
    place = stage.folder / (MERGED if stage.name == "merge" else "final")
    try:
        if not place.is_dir():
            raise CheckpointError(f"{place} is gone")
        if stage.trains and stage.training.use_lora:
            adapter_folder(str(place), None, "final")
        else:
            check_model_files(str(place), "final")
    except PreftuneError as error:
        raise CheckpointError(
            f"it is finished, and its model is not whole ({error}); restore it, or delete "
            f"{stage.folder} to make it again"
        ) from error


def _check_inputs(config: ComposedConfig) -> None:
    """Look at device and data as `check` does; loads no weights.

    Args:
        config: of a stage, whose model is there.
    """
    findings = Findings()
    if isinstance(config, ExperimentConfig):
        found = look_at_model(config, findings, None)
        if found is not None:
            with findings:
                load_experiment_pairs(*found, ProgressDisplay("none"))
    elif isinstance(config, ScoreConfig):
        with findings:
            assert config.dataset_name is not None  # the config refuses an unset one
            load_dataset_pairs(
                config,
                prepare_tokenizer(config),
                ProgressDisplay("none"),
                [(config.dataset_name, None)],
                config.dataset_split,
                context=None,
            )
    findings.raise_all()


def _standing_in(stage: Stage, pipeline: Pipeline, pending: Sequence[Stage]) -> ComposedConfig:
    """The config of a stage, with a model that is there in place of one that is still to be made.

    That is the model of the first training that is not finished, or else of the last one.
    """
    unmade = [other for other in pending if _starts_from(stage, other)]
    if not unmade:
        return stage.config
    training = [other for other in pipeline.stages if other.trains]
    start = next((other for other in training if other in pending), training[-1]).training
    config: Any = copy(stage.config)
    for key in ("model_name_or_path", "model_revision", *TOKENIZER):
        setattr(config, key, getattr(start, key))
    if isinstance(config, ExperimentConfig):
        config.use_lora, config.adapter_name_or_path = False, None
    return config


# ---------------------------------------------------------------- the stages


def _run(stage: Stage, runtime: Runtime) -> list[str]:
    """Run one stage; gives what is to be said of it."""
    config = stage.config
    if isinstance(config, ExperimentConfig):
        train(config)
        return []
    runtime.decide(lambda: _prepare(stage))
    if isinstance(config, MergeConfig):
        return [runtime.decide(lambda: merge(config))]
    assert isinstance(config, ScoreConfig)
    summary = score(config)
    numbers = {key: value for key, value in asdict(summary).items() if value is not None}
    numbers["model"] = config.model_name_or_path
    numbers["reference"] = config.reference_model_name_or_path
    place = stage.folder / RESULTS
    runtime.decide(lambda: write_atomically(place, json.dumps(numbers, indent=1) + "\n"))
    return [*str(summary).splitlines(), f"saved {place}"]


def _prepare(stage: Stage) -> None:
    """Say in its folder what the stage was asked for; what a kill left of it goes."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / SCORES).unlink(missing_ok=True)
    note = {"made_by": "preftune", "stage": stage.name, "config": _as_written(stage.config)}
    write_atomically(stage.folder / NOTE, json.dumps(note, indent=1) + "\n")


def _as_written(config: ComposedConfig) -> dict[str, Any]:
    """The settings as JSON gives them back, without secrets."""
    return redacted_values(json.loads(json.dumps(config.to_dict(), default=str)))
