"""When to train, log, evaluate, save and stop."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from preftune.batching.batcher import LaidOut, RowBatcher
from preftune.batching.micro_batches import MicroBatching
from preftune.batching.sampler import PairSampler
from preftune.config.evaluation import steps_between
from preftune.config.experiment import ExperimentConfig
from preftune.distributed.runtime import Runtime
from preftune.errors import ConfigError, Interrupted, TrainingDiverged
from preftune.objective import Objective
from preftune.tracking.jsonl import MetricsFile
from preftune.tracking.progress import ProgressDisplay, Update
from preftune.training.ahead import Ahead
from preftune.training.costs import Costs
from preftune.training.early_stopping import EarlyStopping
from preftune.training.memory import (
    explain_lack_of_memory,
    num_positions_of,
    peak_memory_gib,
    rows_and_tokens,
    training_remedies,
)
from preftune.training.nonfinite import describe_fault, losses_alone
from preftune.training.optimizer import Schedule
from preftune.training.retention import BestCheckpoint
from preftune.training.signals import SignalRequests
from preftune.training.step import TrainState, train_step

SHOWN_ROWS = 8
GOES_ON = "; the same command with that goes on from the last checkpoint"
SHOWN = {
    "loss": "loss",
    "perplexity": "perplexity",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "kl/forward": "kl",
    "perf/peak_memory_gib": "peak GiB",
}


@dataclass
class TrainingLoop:
    """Runs a prepared state to its last step.

    Built by a recipe, which owns all choices; the loop only decides when.
    """

    config: ExperimentConfig
    runtime: Runtime
    state: TrainState
    objective: Objective[Any]
    batcher: RowBatcher
    sampler: PairSampler
    micro_batching: MicroBatching
    schedule: Schedule
    num_steps: int
    metrics_file: MetricsFile
    display: ProgressDisplay
    evaluate: Callable[[], dict[str, dict[str, float]]] | None
    """Metrics by label of the held-out set, empty for a single one; None without any."""
    save: Callable[[], None]
    """Hand a checkpoint of the state as it is to be written, maybe in the background."""
    save_failed: Callable[[], bool]
    """Whether one could not be written on this rank."""
    settle: Callable[[], None]
    """Wait until all are on disk; raises on every rank what went wrong on any."""
    tell_trackers: Callable[[], None]
    """Let them know that the files hold all there is of the steps so far."""
    note: Callable[[], None]
    """Write what the state's guards have met into the run's manifest."""
    report: Callable[[], None]
    """Write the run's report again."""
    requests: SignalRequests
    """What signals ask for."""
    costs: Costs
    """Takes the seconds that are not spent on training."""
    sample: Callable[[int], None] | None = None
    """Let the policy, after so many steps, answer the run's prompts; None without any."""
    deadline: float | None = None
    """When to save and stop, by `time.monotonic`; None for never."""
    best: BestCheckpoint | None = None
    """The best evaluation so far; None where none is kept."""
    early_stopping: EarlyStopping | None = None
    """When evaluations end the run; None for never."""
    on_step: Callable[[int, list[str]], None] | None = None
    """Called after each step with its number, counted from 1, and the ids of this rank's rows."""
    _window_began: float = field(default_factory=time.perf_counter)
    _window_pairs: int = 0
    _window_tokens_before: int = 0
    _window_steps: int = 0
    _unchecked: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Step -> tokens before it, and batches skipped with it, of the steps whose finiteness has not
    been read yet."""

    def run(self) -> None:
        """Train until the last step.

        Raises:
            TrainingDiverged: a loss or gradient was not finite.
            Interrupted: a signal asked to stop, or the time is up; a checkpoint was saved.
            CheckpointError: a checkpoint could not be written.
        """
        total, start = self.num_steps, self.state.step
        if self._is_over():  # stopped when its model was not written yet
            return
        if start == 0 and self.config.eval_on_start and self.evaluate is not None:
            self._append(self._evaluated_metrics())
            self.tell_trackers()
            self._report()
        self._start_window()
        with (
            self.requests.stopping(),
            Ahead(self._lay_out, start, total) as laid_out,
            self.display.stage("train", total, "step", start) as update,
        ):
            for micro_batches in laid_out:
                self._one_step(micro_batches)
                self._after_step(update)
                if self._is_over():
                    break
        self.settle()

    def _is_over(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.is_over

    def _lay_out(self, step: int) -> list[LaidOut]:
        runtime = self.runtime
        batch = self.sampler.batch(step)
        shares = self.micro_batching.split(batch, runtime.data_rank, runtime.data_size)
        return [self.batcher.lay_out(share, batch) for share in shares]

    def _one_step(self, micro_batches: Sequence[LaidOut]) -> None:
        step = self.state.step
        batch = self.sampler.batch(step)
        num_rows = len(batch)
        num_tokens = self.state.num_tokens
        with self._explained(micro_batches):
            train_step(
                self.state,
                [self.batcher.place(laid_out) for laid_out in micro_batches],
                self.objective,
                self.runtime,
                num_rows=num_rows,
                learning_rate=self.schedule(step),
                num_terms=self.batcher.num_terms(batch),
                max_skipped=self.config.allowed_skips,
            )
        self._unchecked[step + 1] = num_tokens, self.state.num_skipped
        if self.on_step is not None:
            trained = [int(row) for part in micro_batches for row in part.rows[: part.num_rows]]
            self.on_step(step + 1, [self.batcher.examples[row].row_id for row in trained])
        self._window_pairs += num_rows
        self._window_steps += 1

    def _explained(self, micro_batches: Sequence[LaidOut]) -> AbstractContextManager[None]:
        def heaviest() -> tuple[int, int]:
            sizes = [(num_positions_of(m.layout), m.num_rows) for m in micro_batches]
            positions, num_rows = max(sizes)
            return num_rows, positions

        accumulation = self.config.gradient_accumulation_steps
        return explain_lack_of_memory(
            f"in step {self.state.step + 1}",
            self.runtime.device,
            lambda: f"the micro-batch ({rows_and_tokens(*heaviest())})",
            lambda: training_remedies(*heaviest(), accumulation),
            then=GOES_ON,
        )

    def _after_step(self, update: Update) -> None:
        step = self.state.step
        stopping, asked = self._asked()
        logging = step % self.config.logging_steps == 0 or step == self.num_steps
        saving = self._checkpoint_due(step) or asked or stopping is not None
        evaluating = self.evaluate is not None and self._evaluation_due(step)
        sampling = self._sampling_due(step)
        if logging or saving or evaluating or sampling:
            self._stop_if_diverged()  # host sync
        evaluated = self._evaluated_metrics() if evaluating else {}
        over = evaluating and self._stops_early(evaluated)
        record = self._logged_metrics() if logging or over else {}
        record |= evaluated
        self._append(record)
        if sampling or over:
            self._sample(step)
        if record or sampling:
            self.tell_trackers()
        if evaluating:
            self._report()
        is_best = evaluating and self._is_best(evaluated)
        update(step, {label: record[key] for key, label in SHOWN.items() if key in record} or None)
        if saving or is_best or over:
            self.save()
        if stopping is not None and not over:
            self.settle()
            raise Interrupted(
                f"{stopping}: stopped after step {step} of {self.num_steps}, with a checkpoint "
                "saved; run the same command again to go on"
            )

    def _append(self, record: dict[str, float]) -> None:
        if record and self.runtime.is_main:
            self.metrics_file.append({"step": self.state.step, **record})

    def _sample(self, step: int) -> None:
        if self.sample is None:
            return
        began = time.perf_counter()
        with self.costs.of("sampling"):
            self.sample(step)
        self._window_began += time.perf_counter() - began  # it is not training time

    def _asked(self) -> tuple[str | None, bool]:
        """Why to stop, if there is a reason, and whether to save: the same on all ranks."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        signalled, late, save, failed = self.runtime.any_rank(
            self.requests.stop is not None, late, self.requests.take_save(), self.save_failed()
        )
        if failed:
            self.settle()
        if self.state.step == self.num_steps or not (signalled or late):
            return None, save
        if signalled:
            return f"{self.requests.stop or 'a signal'} received", save
        return f"max_run_time {self.config.max_run_time} is up", save

    def _is_best(self, record: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far, which then is held as such."""
        if self.best is None:
            return False
        try:
            better = self.best.is_beaten_by(record)
        except ConfigError:
            self.save()  # nothing but the option is wrong
            self.settle()
            raise
        # What rank 0 sees holds: a last bit that differs must not part the ranks.
        (better,) = self.runtime.any_rank(better and self.runtime.is_main)
        if better:
            self.best.take(record, self.state.step)
        return better

    def _stops_early(self, record: dict[str, float]) -> bool:
        """Whether evaluations up to this one end the run before its last step."""
        if self.early_stopping is None:
            return False
        self.early_stopping.take(self.runtime.send(record))  # as of rank 0: see `_is_best`
        return self.early_stopping.is_over

    def _logged_metrics(self) -> dict[str, float]:
        means = self.state.window.means(self.runtime.all_reduce)  # host sync
        means = self.objective.summary(means)
        self.state.window.clear()
        self._warn(means)
        if self.config.allowed_skips:
            means["skipped_batches"] = len(self.state.guards.skipped_steps)
        if self.state.loss_scale is not None:
            scale = self.state.loss_scale.state()  # host sync
            means |= {"loss_scale": scale["value"], "overflow_steps": scale["num_skipped"]}
        num_tokens = int(self.state.num_tokens)
        seconds = time.perf_counter() - self._window_began
        unit = "pairs" if self.config.stage == "dpo" else "rows"
        record = {
            **means,
            "epoch": self.sampler.epoch_at(self.state.step),
            "num_tokens": num_tokens,
            f"perf/{unit}_per_second": self._window_pairs / seconds,
            "perf/tokens_per_second": (num_tokens - self._window_tokens_before) / seconds,
            "perf/step_seconds": seconds / self._window_steps,
            "perf/peak_memory_gib": peak_memory_gib(self.runtime.device),
        }
        self._start_window()
        return record

    def _evaluated_metrics(self) -> dict[str, float]:
        assert self.evaluate is not None  # the caller asked whether evaluation is due
        began = time.perf_counter()
        with self.costs.of("evaluation"):
            evaluated = self.evaluate()
        # Evaluation is not training time.
        self._window_began += time.perf_counter() - began
        record = {}
        for label, metrics in evaluated.items():
            shown = [(name, metrics[key]) for key, name in SHOWN.items() if key in metrics]
            text = "  ".join(f"{name} {value:.4g}" for name, value in shown)
            of = f" of {label}" if label else ""
            self.display.say(f"evaluation{of} after step {self.state.step}: {text}")
            prefix = f"eval/{label}/" if label else "eval/"
            record |= {prefix + key: value for key, value in metrics.items()}
        return record

    def _report(self) -> None:
        began = time.perf_counter()
        self.report()
        self._window_began += time.perf_counter() - began  # it is not training time

    def _start_window(self) -> None:
        self._window_began = time.perf_counter()
        self._window_tokens_before = int(self.state.num_tokens)
        self._window_pairs = self._window_steps = 0

    def _warn(self, means: dict[str, float]) -> None:
        warnings = self.state.guards.look(self.state.step, means)
        for warned in warnings:
            self.display.say(f"warning after step {warned.step}: {warned.text}")
        if warnings:
            self.note()

    def _stop_if_diverged(self) -> None:
        """Read what the device found of the steps since this was called last."""
        counts = [num_skipped for _, num_skipped in self._unchecked.values()]
        bad_step, *counts = torch.stack([self.state.bad_step, *counts]).tolist()  # host sync
        self._tell_skipped(counts)
        if bad_step:
            self._stop_at(bad_step)
        self._unchecked.clear()

    def _tell_skipped(self, counts: list[int]) -> None:
        skipped = self.state.guards.skipped_steps
        new = []
        for step, count in zip(self._unchecked, counts, strict=True):
            if count > len(skipped) + len(new):
                new.append(step)
        skipped += new
        for step in new:
            rows = ", ".join(self.row_ids(step)[:SHOWN_ROWS])
            self.display.say(
                f"step {step} was skipped: its loss or gradient is not finite (its rows: {rows}; "
                f"all of them are in run.json; {len(skipped)} skipped so far, and at most "
                f"{self.config.allowed_skips} may be)"
            )
        if new:
            self.note()

    def _stop_at(self, bad_step: int) -> None:
        # No update was applied from the bad step on: what is saved is the state from before it.
        self.state.step, self.state.num_tokens = bad_step - 1, self._unchecked[bad_step][0]
        self.state.window.clear()
        self.save()
        rows = self.sampler.batch(bad_step - 1)
        losses = losses_alone(self.state, self.objective, self.batcher, self.runtime, rows)
        row_ids = self.row_ids(bad_step)
        already = ""
        if self.config.allowed_skips:
            already = f", after {self.config.allowed_skips} skipped ones (max_skipped_batches)"
        remedy = "set max_grad_norm"
        if self.state.loss_scale is not None:
            remedy += " or mixed_precision bf16 or fp32, whose numbers reach further than fp16's"
        raise TrainingDiverged(
            f"the loss or gradient of step {bad_step} is not finite{already}; "
            f"{describe_fault(row_ids, losses)}. Its rows: {', '.join(row_ids)}. "
            "The state from before that step is saved in "
            f"checkpoints/step-{bad_step - 1:08d}; look at those rows, lower learning_rate "
            f"({self.config.peak_rate:g}), or {remedy}"
        )

    def row_ids(self, step: int) -> list[str]:
        """Ids of the rows of a step, counted from 1."""
        return [self.batcher.examples[row].row_id for row in self.sampler.batch(step - 1)]

    def _checkpoint_due(self, step: int) -> bool:
        every = self.config.checkpointing_steps
        if every is None:
            return False
        if step == self.num_steps:
            return True
        if every == "epoch":
            return step % self.sampler.steps_per_epoch == 0
        return step % int(every) == 0

    def _evaluation_due(self, step: int) -> bool:
        if step == self.num_steps:
            return True
        if self.config.eval_strategy == "epoch":
            return step % self.sampler.steps_per_epoch == 0
        every = self.config.eval_steps
        if self.config.eval_strategy != "steps" or every is None:
            return False
        return step % steps_between(every, self.num_steps) == 0

    def _sampling_due(self, step: int) -> bool:
        every = self.config.sample_steps
        if self.sample is None or every is None:
            return False
        return step == self.num_steps or step % steps_between(every, self.num_steps) == 0
