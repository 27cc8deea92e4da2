"""The parts of a run that touch its folder and its manifest."""

import os
import shutil
import time
from collections.abc import Callable
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
from preftune.config.paths import cache_root
from preftune.data.chat import answer_frame
from preftune.data.table import TokenRows
from preftune.distributed.runtime import Runtime
from preftune.errors import CheckpointError
from preftune.evaluation.held_out import evaluate_pairs
from preftune.files import hold_alone, write_atomically
from preftune.model.layout_choice import LayoutChoice
from preftune.model.load import DTYPES, LoadedModel, save_model, stop_at
from preftune.objective import Objective
from preftune.recipes.model_card import model_card
from preftune.recipes.pairs import Pairs
from preftune.redaction import redacted, redacted_values
from preftune.reference.build import MAX_TOKENS_PER_MICRO_BATCH, reference_logps
from preftune.reference.fingerprints import namespace_key
from preftune.reference.store import ReferenceStore
from preftune.tracking.jsonl import MetricsFile
from preftune.tracking.progress import ProgressDisplay, counting
from preftune.tracking.tracker import Tracker, open_tracker
from preftune.training.checkpoint import load_checkpoint, read_document, save_checkpoint
from preftune.training.dry_run import try_heaviest
from preftune.training.loop import GOES_ON
from preftune.training.memory import (
    explain_lack_of_memory,
    peak_memory_gib,
    rows_and_tokens,
    scoring_remedies,
)
from preftune.training.run_folder import RunStart, new_manifest, remove_old_checkpoints
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
        self._trackers: list[Tracker] = []
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

    def batchers(self, fields: dict[str, Any]) -> tuple[RowBatcher, dict[str, RowBatcher]]:
        """Training pairs, and held-out ones by label, with their reference values."""
        namespace = namespace_key(fields)
        train = self._batcher(self.pairs.train.examples, fields, "reference")
        held_out = {}
        if self.config.eval_strategy != "never":
            for label, pairs in self.pairs.held_out.items():
                stage = f"reference ({label or 'held out'})"
                held_out[label] = self._batcher(pairs.examples, fields, stage)
        if train.reference is not None:
            self.manifest["reference_namespace"] = namespace
        return train, held_out

    def _batcher(
        self,
        examples: TokenRows,
        fields: dict[str, Any],
        stage: str,
    ) -> RowBatcher:
        config, runtime = self.config, self.runtime
        values = None
        if config.stores_reference:
            store = ReferenceStore(cache_root(config.cache_dir), namespace_key(fields), fields)
            # Rank 0 scores what is missing, with the module inside the engine's wrapper, whose
            # forward would wait for the other ranks; they then find the values in the store.
            policy = self.loaded.policy.eval()
            most = max(MAX_TOKENS_PER_MICRO_BATCH, int(examples.longest_side.max()))
            with (
                runtime.main_first(),
                self.display.stage(stage, examples.lengths[:, 1:].size, "answer") as update,
                explain_lack_of_memory(
                    "while the reference is scored",
                    runtime.device,
                    lambda: f"a forward of up to {most} tokens",
                    lambda: ["a lower --max_length", "--dtype bfloat16"],
                    then="; what is scored already is kept",
                ),
            ):
                values = reference_logps(
                    policy,
                    examples,
                    store,
                    layout=self.layout,
                    device=runtime.device,
                    progress=counting(update),
                )
            self.display.say(
                f"{stage}: {values.num_computed} log-probs computed, "
                f"{values.num_reused} reused from {store.folder}"
            )
            self.manifest.setdefault("reference", {})[stage] = {
                "computed": values.num_computed,
                "reused": values.num_reused,
            }
        sums = None if values is None else values.sums
        return RowBatcher(
            examples,
            sums,
            self.layout,
            runtime.device,
            self._columns(examples),
            examples.num_scored[:, 0] if config.reads_mean_length else None,
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
        if checkpoint is not None:
            document = read_document(checkpoint)
            self._check_same_start(document["identity"])
            policy = self.loaded.policy.model
            load_checkpoint(checkpoint, state, policy, is_main=self.runtime.is_main)
            if state.step > self.num_steps:
                raise CheckpointError(
                    f"{checkpoint} is of step {state.step}, and this run has {self.num_steps} "
                    "steps; raise num_epochs or max_train_steps, or take an earlier checkpoint"
                )
            offset = document["metrics_offset"]
            self.display.say(f"going on after step {state.step}, from {checkpoint}")
        if self.runtime.is_main:
            folder.root.mkdir(parents=True, exist_ok=True)
            self._lock = hold_alone(folder.root)
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
        """Save the state after its step, and drop checkpoints beyond the retention."""
        window = state.window.snapshot(self.runtime.all_reduce)
        if self.runtime.is_main:
            metrics_file.sync()
            save_checkpoint(
                self.start.folder.checkpoint(state.step),
                state,
                self.loaded.policy.model,
                window,
                {
                    "config": self.manifest["config"],
                    "identity": self._identity(),
                    "metrics_offset": metrics_file.offset,
                },
            )
            remove_old_checkpoints(self.start.folder, self.config.keep_last_n_checkpoints)
        self.runtime.barrier()

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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


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
