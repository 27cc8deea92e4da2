"""The parts of a run that touch its folder and its manifest."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import MicroBatching, num_positions
from preftune.batching.sampler import PairSampler
from preftune.batching.shards import RowPart
from preftune.config.experiment import ExperimentConfig
from preftune.data.chat import answer_frame
from preftune.data.table import TokenRows
from preftune.distributed.runtime import Runtime
from preftune.files import write_atomically
from preftune.model.layout_choice import LayoutChoice
from preftune.model.load import LoadedModel
from preftune.objective import Objective
from preftune.recipes.checkpoints import Checkpoints
from preftune.recipes.going_on import hold_folder, look_into, take_over_metrics
from preftune.recipes.pairs import Pairs
from preftune.recipes.publish import CheckpointPusher
from preftune.recipes.reference import Reference, rows_to_score, stage_name
from preftune.recipes.results import held_out_results
from preftune.recipes.sampling import PolicyAnswers, Prompts
from preftune.redaction import redacted_values
from preftune.reference.store import ReferenceStore
from preftune.report.page import try_report
from preftune.tracking.follower import Followers
from preftune.tracking.jsonl import MetricsFile
from preftune.tracking.progress import ProgressDisplay
from preftune.tracking.tracker import TrackedRun, open_tracker
from preftune.training.checkpoint import Snapshot, snapshot
from preftune.training.costs import Costs
from preftune.training.dry_run import try_heaviest
from preftune.training.early_stopping import EarlyStopping
from preftune.training.generators import generator_tensors
from preftune.training.memory import peak_memory_gib
from preftune.training.restore import load_checkpoint
from preftune.training.run_folder import RunStart, new_manifest
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
        group = runtime.sequence_group
        self.layout = Layout(
            layout.name,
            loaded.policy.limits,
            config.ld_alpha,
            config.scores_prompt,
            None if group is None else RowPart(group.rank, group.size),
        )
        self.sampler = sampler
        self.num_steps = num_steps
        self.began = time.monotonic()  # clocks may be set
        self.earlier_seconds = 0.0
        self.costs = Costs()
        self.early_stopping = EarlyStopping.of(config)
        self._samples_file = MetricsFile(start.folder.samples)
        self.answers: PolicyAnswers | None = None
        self._lock: int | None = None
        self._store: ReferenceStore | None = None
        self._followers: Followers | None = None
        self._pusher: CheckpointPusher | None = None
        self.checkpoints = Checkpoints(
            config, start.folder, runtime, display, self._note_best, self._push
        )
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
            "head_chunk_size": loaded.policy.head_chunk_size(runtime.device),
            "compact_head": loaded.policy.compact_head,
            "steps": num_steps,
            "steps_per_epoch": sampler.steps_per_epoch,
            "global_batch_size": sampler.global_batch_size,
            "data": pairs.describe(),
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
            examples.num_scored[:, 0] if self.config.row_kind == "supervised" else None,
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

    def ask(self, prompts: Prompts | None) -> None:
        """Let the policy, which has not trained yet, answer prompts.

        Args:
            prompts: None for none.
        """
        if prompts is None:
            return
        self.answers = PolicyAnswers(
            self.config,
            prompts,
            self.loaded,
            self.layout.name,
            self.tokenizer,
            self.stop_token_id(),
            self.runtime,
            self.display,
        )
        folder, checkpoint = self.start.folder, self.start.checkpoint
        kept = [folder.start_answers]
        if checkpoint is not None:  # maybe another run's
            kept.append(checkpoint.parent.parent / folder.start_answers.name)
        with self.costs.of("sampling"):
            self.answers.begin(self.manifest["model"]["weights"], kept)

    def sample(self, step: int) -> None:
        """Let the policy answer the prompts as it is after a step."""
        assert self.answers is not None  # with sample_steps there are prompts
        rows = self.answers.sample(step)
        if not self.runtime.is_main:
            return
        for row in rows:
            self._samples_file.append(row)

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
        heaviest = micro_batching.heaviest(batches, runtime.data_rank, runtime.data_size)
        try_heaviest(
            state,
            heaviest,
            batcher,
            objective,
            runtime,
            num_micro_batches=len(
                micro_batching.split(self.sampler.batch(0), runtime.data_rank, runtime.data_size)
            ),
            accumulation=self.config.gradient_accumulation_steps,
        )
        positions = num_positions(heaviest, micro_batching.sizes, self.layout.name)
        self.display.say(
            f"the heaviest micro-batch ({len(heaviest)} {self.pairs.train.unit}, {positions} "
            f"tokens) fits: {peak_memory_gib(runtime.device):.1f} GiB at most so far"
        )

    def begin(self, state: TrainState, batcher: RowBatcher) -> MetricsFile:
        """Make or take up the folder; restores the checkpoint, if there is one.

        Args:
            state: before its first step, or what the checkpoint is put into.
            batcher: of the training pairs, for the ids of their rows.
        """
        metrics_file = MetricsFile(self.start.folder.metrics)
        self.checkpoints.begin(state.engine)
        checkpoint = self.start.checkpoint
        offsets = {metrics_file: 0, self._samples_file: 0}
        if checkpoint is not None:
            document = self._restore(state, checkpoint)
            offsets[metrics_file] = document["metrics_offset"]
            offsets[self._samples_file] = document.get("samples_offset", 0)
            self.display.say(f"going on after step {state.step}, from {checkpoint}")
        self.runtime.together(lambda: self._take_up_folder(state, batcher, offsets))
        return metrics_file

    def _restore(self, state: TrainState, checkpoint: Path) -> dict[str, Any]:
        """Take the state from a checkpoint; gives the checkpoint's document."""
        document = self.runtime.together(
            lambda: look_into(checkpoint, self._identity(), self.num_steps)
        )
        now = self._how_spread()
        if (then := document["spread"]) != now:
            self.display.say(
                f"the checkpoint is of {then['processes']} processes ({then['engine']}), and this "
                f"run goes on with {now['processes']} ({now['engine']}): to the same numbers but "
                "for the order of sums"
            )
        policy, runtime = self.loaded.policy.model, self.runtime
        load_checkpoint(checkpoint, state, policy, device=runtime.device, ranks=runtime)
        found = self.runtime.together(lambda: self.checkpoints.restore_best(document.get("best")))
        if found is not None:
            self.manifest["best_checkpoint"] = found
        if self.early_stopping is not None:
            self.early_stopping.restore(document.get("early_stopping"))
        return document

    def _how_spread(self) -> dict[str, Any]:
        return {"processes": self.runtime.world_size, "engine": self.config.engine}

    def _take_up_folder(
        self, state: TrainState, batcher: RowBatcher, offsets: dict[MetricsFile, int]
    ) -> None:
        if not self.runtime.is_main:
            return
        folder = self.start.folder
        folder.root.mkdir(parents=True, exist_ok=True)
        self._lock = hold_folder(self.config, self.start)
        self._take_up_manifest()
        self._take_up_guards(state, batcher)
        if self.config.hub_strategy in ("checkpoint", "all_checkpoints"):
            run_id = self.manifest["run_id"]
            self._pusher = CheckpointPusher(self.config, folder, run_id, self.display.say)
        # First, so that a kill from here on leaves a folder that is known as a run's.
        folder.write_manifest(self.manifest)
        folder.checkpoints.mkdir(exist_ok=True)
        for file, offset in offsets.items():
            take_over_metrics(file, self.start.checkpoint, offset)
        if self.answers is not None:
            self.answers.write(folder.start_answers)
        # `resume` belongs to the command, not to the run that a copy of it would repeat.
        settings = replace(self.config, resume="auto")
        write_atomically(folder.config, settings.to_yaml(redacted_values))

    def follow(self) -> Callable[[], None]:
        """Bring the trackers of `report_to` what they lack, from now on, beside the training.

        Returns:
            What lets them know that the files hold all there is of the steps so far.
        """
        if not self.runtime.is_main or not self.config.report_to:
            return lambda: None
        settings, folder = self.manifest["config"], self.start.folder
        tracked = TrackedRun(
            folder=folder.root,
            id=self.manifest["run_id"],
            name=settings["run_name"],
            project=settings["exp_name"],
            facts={
                **settings,
                "run_id": self.manifest["run_id"],
                "model_fingerprint": self.manifest["model"]["weights"],
                "dataset_fingerprint": self.pairs.train.examples.fingerprint(),
                "held_out_fingerprints": self._held_out_fingerprints(),
            },
        )
        openers = {name: partial(open_tracker, name) for name in self.config.report_to}
        files = [folder.metrics, folder.samples]
        self._followers = Followers(openers, tracked, files, self.display.say)
        return self._followers.wake

    def _take_up_manifest(self) -> None:
        folder = self.start.folder
        if folder.manifest.is_file():
            earlier = folder.read_manifest()
            self.earlier_seconds = earlier.get("seconds", 0.0)
            self.costs.take_up(earlier.get("costs", {}))
            self.manifest["started"] = earlier["started"]
            # What trackers and the hub know the run by, however often it goes on.
            self.manifest["run_id"] = earlier.get("run_id", self.manifest["run_id"])
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

    def _held_out_fingerprints(self) -> dict[str, str]:
        return {k: pairs.examples.fingerprint() for k, pairs in self.pairs.held_out.items()}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the straight one."""
        return {
            "model weights": self.manifest["model"]["weights"],
            "dataset": self.pairs.train.examples.fingerprint(),
            "held-out datasets": self._held_out_fingerprints(),
            "pairs a step": self.manifest["global_batch_size"],
            "precision": self.runtime.precision,
            "layout": self.layout.name,
            "attention": self.manifest["attention"],
            "reference namespace": self.manifest.get("reference_namespace"),
            "adapter": self.loaded.adapter and self.loaded.adapter.settings,
        }

    def save_checkpoint(self, state: TrainState, metrics_file: MetricsFile) -> None:
        """Save the state after its step, and drop checkpoints beyond the retention.

        In the background, if the configuration says so: then `checkpoints.settle` waits for it.
        """
        window = state.window.snapshot(self.runtime.all_reduce)
        generators = self.runtime.gather(generator_tensors(self.runtime.device))
        self.runtime.decide(self._samples_file.sync)
        extra = {
            "config": self.manifest["config"],
            "identity": self._identity(),
            "spread": self._how_spread(),
            "metrics_offset": metrics_file.offset,
            "samples_offset": self._samples_file.offset,
            "early_stopping": self.early_stopping and self.early_stopping.as_dict(),
            "facts": self._facts(),
        }

        def content() -> Snapshot:
            model, adapter = self.loaded.policy.model, self.loaded.adapter
            taken = adapter and adapter.taken
            return snapshot(state, model, window, generators, extra, self.runtime, taken)

        def save() -> None:
            if self.runtime.is_main:
                self.checkpoints.save(content(), metrics_file)

        with self.display.stage(f"save step {state.step}", None, "byte"):
            if state.engine.is_sharded:
                self.checkpoints.save_together(content(), metrics_file, state.step)
            else:
                self.runtime.together(save)

    def _push(self, checkpoint: Path) -> None:
        if self._pusher is not None:
            self._pusher.offer(checkpoint)

    def _note_best(self, best: dict[str, Any]) -> None:
        self.manifest["best_checkpoint"] = best
        if self.runtime.is_main:
            self.start.folder.write_manifest(self.manifest)

    def stop_token_id(self) -> int | None:
        """The token that ends answers of a chat; None where the data is plain text."""
        if self.pairs.train.examples.is_text.all():
            return None
        return answer_frame(self.tokenizer).stop_id

    def _facts(self) -> dict[str, Any]:
        """What `preftune export` has to know of the run."""
        data = self.manifest["data"]
        return {
            "model_commit": self.manifest["model"]["commit"],
            "adapter_commit": self.manifest["model"]["adapter_commit"],
            "stop_token_id": self.stop_token_id(),
            "data": {use: _without_rows(counts) for use, counts in data.items()},
            "results": held_out_results(self.start.folder.metrics) if self.runtime.is_main else [],
            **{key: self.manifest[key] for key in ("versions", "global_batch_size", "precision")},
        }

    def end(self, status: str) -> dict[str, Any]:
        """Write the manifest's last word."""
        seconds = self.earlier_seconds + time.monotonic() - self.began
        if costs := self.costs.describe(seconds):
            self.display.say(costs)
        self.manifest |= {
            "status": status,
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(seconds, 3),
            "costs": self.costs.as_dict(seconds),
            "peak_memory_gib": peak_memory_gib(self.runtime.device),
        }
        if self.runtime.is_main:
            self.start.folder.write_manifest(self.manifest)
        return self.manifest

    def report(self) -> None:
        """Write `report.html`."""
        if self.runtime.is_main:
            try_report(self.start.folder.root, self.display.say)

    def release(self) -> None:
        """Close the trackers, and let other processes have the folder."""
        if self._followers is not None:
            status = self.manifest["status"]
            self._followers.close("failed" if status == "running" else status)
        self.checkpoints.close()
        if self._pusher is not None:
            self._pusher.stop()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._store = None


def _without_rows(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of a data set without the lists of rows."""
    plain = {key: value for key, value in counts.items() if key != "dropped_rows"}
    return (
        plain | {"sources": [_without_rows(s) for s in counts.get("sources", ())]}
        if ("sources" in counts)
        else plain
    )
