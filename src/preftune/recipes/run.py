"""The parts of a run that touch its folder and its manifest."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import MicroBatching, largest, num_positions, sorted_batches
from preftune.batching.sampler import PairSampler
from preftune.config.experiment import ExperimentConfig
from preftune.data.chat import answer_frame
from preftune.data.table import TokenRows
from preftune.distributed.runtime import Runtime
from preftune.errors import CheckpointError, PreftuneError
from preftune.evaluation.held_out import evaluate_pairs
from preftune.files import hold_alone, write_atomically
from preftune.model.layout_choice import LayoutChoice
from preftune.model.load import DTYPES, LoadedModel, save_model, stop_at
from preftune.objective import Objective
from preftune.recipes.model_card import model_card
from preftune.recipes.pairs import Pairs
from preftune.recipes.reference import Reference, rows_to_score, stage_name
from preftune.redaction import redacted, redacted_values
from preftune.reference.store import ReferenceStore
from preftune.tracking.jsonl import MetricsFile
from preftune.tracking.progress import ProgressDisplay, counting
from preftune.tracking.tracker import Tracker, open_tracker
from preftune.training.checkpoint import Snapshot, load_checkpoint, snapshot, write_checkpoint
from preftune.training.dry_run import try_heaviest
from preftune.training.generators import generator_tensors
from preftune.training.integrity import read_document
from preftune.training.loop import GOES_ON
from preftune.training.memory import (
    explain_lack_of_memory,
    peak_memory_gib,
    rows_and_tokens,
    scoring_remedies,
)
from preftune.training.retention import BestCheckpoint, remove_old_checkpoints
from preftune.training.run_folder import RunStart, new_manifest, plan_start
from preftune.training.saver import CheckpointSaver
from preftune.training.step import TrainState


class Run:
    """The parts of one run that touch its folder and its manifest."""

    def __init__(
        self,
        config: ExperimentConfig,
        start: RunStart,
        runtime: Runtime,
        display: ProgressDisplay,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Pairs,
        loaded: LoadedModel,
        layout: LayoutChoice,
        sampler: PairSampler,
        num_steps: int,
    ) -> None:
        """Hold what the methods need; nothing on disk is touched before `begin`."""
        self.config = config
        self.start = start
        self.runtime = runtime
        self.display = display
        self.tokenizer = tokenizer
        self.pairs = pairs
        self.loaded = loaded
        self.layout = Layout(
            layout.name, loaded.policy.limits, config.ld_alpha, config.scores_prompt
        )
        self.sampler = sampler
        self.num_steps = num_steps
        self.began = time.time()
        self.earlier_seconds = 0.0
        self._lock: int | None = None
        self._store: ReferenceStore | None = None
        self._trackers: list[Tracker] = []
        self.best = BestCheckpoint.of(config)
        self._saver: CheckpointSaver | None = None
        self._best_noted: int | None = None
        if not loaded.policy.compact_head:
            display.say(
                "the model does more to its logits than preftune's head knows: every position is "
                "scored, which is right but slower"
            )
        self.manifest = new_manifest(config) | {
            "device": str(runtime.device),
            "threads": torch.get_num_threads(),
            "world_size": runtime.world_size,
            "precision": runtime.precision,
            "layout": layout.name,
            "layout_why": layout.why,
            "attention": layout.attention,
            "attention_tried": layout.tried,
            "head_chunk_size": loaded.policy.head_chunk_size,
            "compact_head": loaded.policy.compact_head,
            "steps": num_steps,
            "steps_per_epoch": sampler.steps_per_epoch,
            "global_batch_size": sampler.global_batch_size,
            "data": _describe_data(pairs),
        }

    def batchers(self, reference: Reference | None) -> tuple[RowBatcher, dict[str, RowBatcher]]:
        """Training pairs, and held-out ones by label, with their reference values.

        Args:
            reference: scores what is missing; None where none is read, or none is stored.
        """
        if reference is not None:
            self._store = reference.store  # in use until the run ends
        rows = rows_to_score(self.config, self.pairs)
        train = self._batcher(rows.pop(None), reference, stage_name(None))
        held_out = {
            str(label): self._batcher(examples, reference, stage_name(label))
            for label, examples in rows.items()
        }
        return train, held_out

    def _batcher(self, examples: TokenRows, reference: Reference | None, stage: str) -> RowBatcher:
        sums = None
        if reference is not None:
            values = reference.logps(examples, stage)
            sums = values.sums
            self.manifest.setdefault("reference", {})[stage] = {
                "computed": values.num_computed,
                "reused": values.num_reused,
            }
        return RowBatcher(
            examples,
            sums,
            self.layout,
            self.runtime.device,
            self._columns(examples),
            examples.num_scored[:, 0] if self.config.reads_mean_length else None,
        )

    def _columns(self, examples: TokenRows) -> dict[str, Tensor]:
        """What the data say of each row besides its tokens, where the loss reads it."""
        columns: dict[str, np.ndarray] = {}
        if (examples.weights != 1).any():
            columns["weight"] = examples.weights
        if self.config.reads_margin:
            columns["margin"] = examples.margins
        if self.config.unpaired:
            columns["is_desirable"] = examples.roles == "chosen"
        return {k: torch.tensor(v, device=self.runtime.device) for k, v in columns.items()}

    def evaluator(
        self,
        state: TrainState,
        objective: Objective[Any],
        held_out: dict[str, RowBatcher],
    ) -> Callable[[], dict[str, dict[str, float]]] | None:
        """What evaluates the held-out pairs, by label; None without them."""
        if not held_out:
            return None
        batches = {
            label: sorted_batches(
                self.pairs.held_out[label].examples.sizes,
                self.layout.name,
                rows=self.config.eval_rows,
                max_tokens=self.config.max_tokens_per_microbatch,
            )
            for label in held_out
        }

        def evaluate(label: str, batcher: RowBatcher) -> dict[str, float]:
            stage = f"evaluate {label}".rstrip()
            sizes = self.pairs.held_out[label].examples.sizes

            def heaviest() -> tuple[int, int]:
                return largest(batches[label], sizes, self.layout.name)

            with (
                self.display.stage(stage, len(batcher.examples), "pair") as update,
                explain_lack_of_memory(
                    "in evaluation",
                    self.runtime.device,
                    lambda: f"the heaviest micro-batch ({rows_and_tokens(*heaviest())})",
                    lambda: scoring_remedies(*heaviest()),
                    then=GOES_ON,
                ),
            ):
                return evaluate_pairs(
                    state.model,
                    objective,
                    batcher,
                    batches[label],
                    self.runtime,
                    running=state.running,
                    progress=counting(update),
                )

        return lambda: {label: evaluate(label, batcher) for label, batcher in held_out.items()}

    def try_heaviest(
        self,
        state: TrainState,
        objective: Objective[Any],
        batcher: RowBatcher,
        micro_batching: MicroBatching,
    ) -> None:
        """Run the micro-batch that takes most memory, and say what it took."""
        runtime = self.runtime
        batches = (self.sampler.batch(step) for step in range(self.num_steps))
        heaviest = micro_batching.heaviest(batches, runtime.rank, runtime.world_size)
        try_heaviest(
            state,
            heaviest,
            batcher,
            objective,
            runtime,
            num_micro_batches=len(micro_batching.split(self.sampler.batch(0))),
            accumulation=self.config.gradient_accumulation_steps,
        )
        positions = num_positions(heaviest, micro_batching.sizes, self.layout.name)
        self.display.say(
            f"the heaviest micro-batch ({len(heaviest)} pairs, {positions} tokens) fits: "
            f"{peak_memory_gib(runtime.device):.1f} GiB at most so far"
        )

    def begin(self, state: TrainState, batcher: RowBatcher) -> MetricsFile:
        """Make or take up the folder; restores the checkpoint, if there is one.

        Args:
            state: before its first step, or what the checkpoint is put into.
            batcher: of the training pairs, for the ids of their rows.
        """
        folder, checkpoint = self.start.folder, self.start.checkpoint
        metrics_file = MetricsFile(folder.metrics)
        offset = 0
        self._saver = CheckpointSaver(
            state.optimizer,
            self.runtime.device,
            in_background=self.config.checkpoint_async,
            say=self.display.say,
        )
        if checkpoint is not None:
            document = read_document(checkpoint)
            self._check_same_start(document["identity"])
            policy = self.loaded.policy.model
            runtime = self.runtime
            load_checkpoint(checkpoint, state, policy, rank=runtime.rank, device=runtime.device)
            if state.step > self.num_steps:
                raise CheckpointError(
                    f"{checkpoint} is of step {state.step}, and this run has {self.num_steps} "
                    "steps; raise num_epochs or max_train_steps, or take an earlier checkpoint"
                )
            offset = document["metrics_offset"]
            self._restore_best(document.get("best"))
            self.display.say(f"going on after step {state.step}, from {checkpoint}")
        if self.runtime.is_main:
            folder.root.mkdir(parents=True, exist_ok=True)
            self._hold_folder()
            self._take_up_manifest()
            self._take_up_guards(state, batcher)
            # First, so that a kill from here on leaves a folder that is known as a run's.
            folder.write_manifest(self.manifest)
            folder.checkpoints.mkdir(exist_ok=True)
            self._take_over_metrics(metrics_file, offset)
            # `resume` belongs to the command, not to the run that a copy of it would repeat.
            settings = replace(self.config, resume="auto")
            write_atomically(folder.config, settings.to_yaml(redacted_values))
        self.runtime.barrier()
        return metrics_file

    def _hold_folder(self) -> None:
        """Lock the folder, and see that it still is what the run was planned from."""
        root = self.start.folder.root
        self._lock = hold_alone(root)
        if plan_start(self.config, held=True) == self.start:
            return
        os.close(self._lock)
        raise CheckpointError(
            f"another process has worked in {root} since this command began; run it again to go on "
            "from there"
        )

    def _restore_best(self, saved: dict[str, Any] | None) -> None:
        if self.best is None:
            return
        self.best.restore(saved, self.start.folder)
        self._hold_best()
        if saved and saved["step"] is not None and self.best.step is None:
            self.display.say(
                f"the best checkpoint so far (step {saved['step']}, {saved['metric']} "
                f"{saved['value']:.6g}) is not in this run's folder or was by another measure: the "
                "best is sought anew from here on"
            )

    def trackers(self, step: int) -> list[Tracker]:
        """Where metrics go besides `metrics.jsonl`, from the step after `step` on."""
        if not self.runtime.is_main or not self.config.report_to:
            return []
        self._trackers = [
            open_tracker(name, self.start.folder.root, step) for name in self.config.report_to
        ]
        return self._trackers

    def _take_up_manifest(self) -> None:
        folder = self.start.folder
        if folder.manifest.is_file():
            earlier = folder.read_manifest()
            self.earlier_seconds = earlier.get("seconds", 0.0)
            self.manifest["started"] = earlier["started"]
            self.manifest["resumed_from"] = earlier.get("resumed_from")
        elif self.start.checkpoint is not None:
            self.manifest["resumed_from"] = str(self.start.checkpoint.resolve())

    def note(self, state: TrainState, batcher: RowBatcher) -> None:
        """Put what the guards have met so far into the manifest on disk."""
        self._take_up_guards(state, batcher)
        if self.runtime.is_main:
            self.start.folder.write_manifest(self.manifest)

    def _take_up_guards(self, state: TrainState, batcher: RowBatcher) -> None:
        guards = state.guards
        self.manifest["warnings"] = [asdict(warned) for warned in guards.warnings]
        self.manifest["skipped_batches"] = [
            {
                "step": step,
                "rows": [batcher.examples[row].row_id for row in self.sampler.batch(step - 1)],
            }
            for step in guards.skipped_steps
        ]

    def _check_same_start(self, before: dict[str, Any]) -> None:
        changed = [
            f"{key} was {before.get(key)}, now {now}"
            for key, now in self._identity().items()
            if before.get(key) != now
        ]
        if changed:
            raise CheckpointError(
                f"{self.start.checkpoint} cannot go on to the same numbers here: "
                f"{'; '.join(changed)}. Restore the files, versions and number of processes of "
                "that run, or start a new --output_dir"
            )

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the straight one."""
        held_out = {k: pairs.examples.fingerprint() for k, pairs in self.pairs.held_out.items()}
        return {
            "model weights": self.manifest["model"]["weights"],
            "dataset": self.pairs.train.examples.fingerprint(),
            "held-out datasets": held_out,
            "pairs a step": self.manifest["global_batch_size"],
            "number of processes": self.runtime.world_size,
            "precision": self.runtime.precision,
            "layout": self.layout.name,
            "attention": self.manifest["attention"],
            "reference namespace": self.manifest.get("reference_namespace"),
        }

    def _take_over_metrics(self, metrics_file: MetricsFile, offset: int) -> None:
        checkpoint = self.start.checkpoint
        if checkpoint is not None and not metrics_file.path.exists():
            # A checkpoint of another run folder: its lines up to that step come along.
            source = checkpoint.parent.parent / metrics_file.path.name
            if source.exists():
                shutil.copyfile(source, metrics_file.path)
        if metrics_file.offset < offset:
            raise CheckpointError(
                f"{metrics_file.path} lacks lines that {checkpoint} had seen; restore it, or start "
                "a new --output_dir"
            )
        metrics_file.rewind(offset)

    def save_checkpoint(self, state: TrainState, metrics_file: MetricsFile) -> None:
        """Save the state after its step, and drop checkpoints beyond the retention.

        In the background, if the configuration says so: then `settle` waits for it.
        """
        window = state.window.snapshot(self.runtime.all_reduce)
        generators = self.runtime.gather(generator_tensors(self.runtime.device))
        if self.runtime.is_main:
            assert self._saver is not None  # made in `begin`
            extra = {
                "config": self.manifest["config"],
                "identity": self._identity(),
                "metrics_offset": metrics_file.offset,
                "best": None if self.best is None else self.best.as_dict(),
            }
            content = snapshot(state, self.loaded.policy.model, window, generators, extra)
            self._saver.save(content, lambda content: self._publish(content, metrics_file))
        if not self.config.checkpoint_async:
            self.runtime.barrier()

    def _publish(self, content: Snapshot, metrics_file: MetricsFile) -> None:
        """Write a checkpoint; in the background, so it touches nothing that training does."""
        folder, config, document = self.start.folder, self.config, content.document
        metrics_file.sync()  # the lines that the checkpoint counts on
        write_checkpoint(folder.checkpoint(document["step"]), content)
        best_step = document["best"] and document["best"]["step"]
        keep, max_gb = config.keep_last_n_checkpoints, config.checkpoint_max_gb
        remove_old_checkpoints(folder, keep, max_gb, best_step)

    def save_failed(self) -> bool:
        """Whether a checkpoint could not be written; notes the best one once it is written."""
        if self._saver is not None and not self._saver.busy and not self._saver.failed:
            self._note_best()
        return self._saver is not None and self._saver.failed

    def settle(self) -> None:
        """Wait until the checkpoint under way is on disk.

        Raises:
            CheckpointError: it could not be written; on every rank.
        """
        error = self._wait_for_save()
        (failed,) = self.runtime.any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise CheckpointError("a checkpoint could not be written; rank 0 says why")
        self._note_best()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Lose no checkpoint that is under way, nor its error, when the block ends with another."""
        try:
            yield
        except PreftuneError as error:
            if failed := self._wait_for_save():
                raise CheckpointError([*failed.problems, *error.problems]) from error
            raise
        finally:
            if failed := self._wait_for_save():
                self.display.say(str(failed))

    def _wait_for_save(self) -> CheckpointError | None:
        try:
            if self._saver is not None:
                self._saver.wait()
        except CheckpointError as error:
            return error
        return None

    def _note_best(self) -> None:
        """Say in run.json which checkpoint is the best, if that is news."""
        best = self.best
        if best is None or best.step == self._best_noted or not self.runtime.is_main:
            return
        self._hold_best()
        self.start.folder.write_manifest(self.manifest)

    def _hold_best(self) -> None:
        best = self.best
        if best is not None and best.step is not None:
            folder = self.start.folder
            path = folder.checkpoint(best.step).relative_to(folder.root)
            self.manifest["best_checkpoint"] = best.as_dict() | {"path": str(path)}
            self._best_noted = best.step

    def save_final(self) -> None:
        """Write `final/`, whole or not at all."""
        if self.runtime.is_main:
            final = self.start.folder.final
            temporary = final.with_name(".partial-final")
            for path in (temporary, final):
                shutil.rmtree(path, ignore_errors=True)
            self._teach_stop_token()
            choice = self.config.save_dtype
            dtype = self.loaded.source_dtype if choice == "auto" else DTYPES[choice]
            self.manifest["save_dtype"] = str(dtype).removeprefix("torch.")
            try:
                save_model(self.loaded, self.tokenizer, temporary, dtype)
                (temporary / "README.md").write_text(
                    redacted(model_card(self.config, self.manifest))
                )
                temporary.rename(final)
            except (OSError, SafetensorError) as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise CheckpointError(
                    f"{final} could not be written ({error}); free some space, and run the same "
                    "command to write it from the last checkpoint"
                ) from error
            self.display.say(f"saved {final}")
        self.runtime.barrier()

    def _teach_stop_token(self) -> None:
        if self.pairs.train.examples.is_text.all():
            return
        stop_id = answer_frame(self.tokenizer).stop_id
        if stop_at(self.loaded.policy.model, stop_id):
            token = self.tokenizer.convert_ids_to_tokens(stop_id)
            self.display.say(f"generation_config.json of final/ stops at {token!r}, too")

    def end(self, status: str) -> dict[str, Any]:
        """Write the manifest's last word."""
        self.manifest |= {
            "status": status,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(self.earlier_seconds + time.time() - self.began, 3),
            "peak_memory_gib": peak_memory_gib(self.runtime.device),
        }
        if self.runtime.is_main:
            self.start.folder.write_manifest(self.manifest)
        return self.manifest

    def release(self) -> None:
        """Close the trackers, and let other processes have the folder."""
        for tracker in self._trackers:
            tracker.close()
        if self._saver is not None:
            self._saver.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._store = None


def _describe_data(pairs: Pairs) -> dict[str, Any]:
    sets = {"train": pairs.train}
    sets |= {f"held_out/{label}".rstrip("/"): held for label, held in pairs.held_out.items()}
    return {
        label: {"name": dataset.name, "fingerprint": dataset.examples.fingerprint()}
        | {"num_pairs": len(dataset.examples)}
        | dataset.counts.as_dict()
        | {"sources": [source.as_dict() for source in dataset.sources]}
        for label, dataset in sets.items()
    }
