"""preftune's side of the comparison: `preftune train`, watched through its progress display."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from preftune import ExperimentConfig
from preftune.batching.batcher import MicroBatch
from preftune.losses import PairLogps
from preftune.model.forward import SequenceLogps
from preftune.objective import PairObjective
from preftune.recipes import run
from preftune.recipes import train as training_recipe
from preftune.tracking.progress import ProgressDisplay

from .clock import Clock, Timer
from .task import Task


class Watch(ProgressDisplay):
    """Marks every step of the stage `train`, and times the stage `reference`."""

    clock: Clock
    reference_pass: dict[str, float] | None = None

    @contextmanager
    def stage(self, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As the class above."""
        with Timer() as timer, super().stage(name, *args, **kwargs) as update:
            if name == "train":
                yield self._marking(update)
            else:
                yield update
        if name == "reference":
            self.reference_pass = {"wall": timer.wall, "cpu": timer.cpu}

    def _marking(self, update: Any) -> Any:
        self.clock.mark()  # the loop makes its first batch after this

        def marked(done: int, values: Any = None) -> None:
            self.clock.mark()
            update(done, values)

        return marked


def train(task: dict[str, Any], settings: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Run a task, and say what each step took.

    Args:
        task: fields of `Task`.
        settings: further fields of the configuration.
        bf16: whether to compute in bf16.
    """
    work = Task(**task)
    config = _config(work, {"mixed_precision": "bf16" if bf16 else "fp32"} | settings)
    watch = Watch("plain")
    watch.clock = Clock(work.warmup, work.steps)
    with patch.object(training_recipe, "ProgressDisplay", lambda *args, **kwargs: watch):
        result = training_recipe.train(config)
    lines = _metrics(work)
    return watch.clock.result() | {
        "losses": [line["loss"] for line in lines],
        "reference_pass": watch.reference_pass,
        "num_tokens": lines[-1]["num_tokens"],
        "layout": result.manifest["layout"],
    }


def gate(task: dict[str, Any], base: str) -> dict[str, Any]:
    """Run a task with `base` as the reference; record what it computes.

    preftune's own choice would be the policy before its first step.
    """
    work = Task(**task)
    settings = {"mixed_precision": "fp32", "logging_steps": 1}
    config = _config(work, settings | {"reference_model_name_or_path": base})
    sums: dict[str, list[list[float]]] = {}

    class Recording(PairObjective):
        def _split(self, sequences: SequenceLogps, micro_batch: MicroBatch) -> PairLogps:
            logps = super()._split(sequences, micro_batch)
            named = {
                "policy_chosen": logps.chosen,
                "policy_rejected": logps.rejected,
                "reference_chosen": logps.ref_chosen,
                "reference_rejected": logps.ref_rejected,
            }
            for name, values in named.items():
                assert values is not None  # dpo reads a reference
                sums.setdefault(name, []).append(values.detach().double().tolist())
            return logps

    with ExitStack() as patches:
        for place, name, value in (
            # No steps: not to be recorded.
            (run, "try_heaviest", lambda *args, **kwargs: None),
            (training_recipe, "check_step_zero", lambda *args, **kwargs: None),
            (training_recipe, "objective_of", Recording),
        ):
            patches.enter_context(patch.object(place, name, value))
        training_recipe.train(config)
    lines = _metrics(work)
    return sums | {
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
    }


def _config(task: Task, settings: dict[str, Any]) -> ExperimentConfig:
    known = {field.name for field in fields(ExperimentConfig)}
    if missing := sorted(set(settings) - known):
        raise SystemExit(f"this preftune has no setting {', '.join(missing)}")
    options: dict[str, Any] = {
        "model_name_or_path": task.model,
        "dataset_name": task.file,
        "max_length": task.max_length,
        "output_dir": f"{task.scratch}/run",
        "cache_dir": f"{task.scratch}/cache",
        "per_device_train_batch_size": task.batch_size,
        "max_train_steps": task.steps,
        "shuffle": False,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "beta": task.beta,
        "checkpointing_steps": None,
        "logging_steps": 10 if torch.cuda.is_available() else 1,
    }
    return ExperimentConfig(**options | settings)


def _metrics(task: Task) -> list[dict[str, float]]:
    lines = (Path(task.scratch) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
