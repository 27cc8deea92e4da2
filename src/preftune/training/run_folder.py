"""A run's folder: what lies in it, and whether a new command may go on there."""

import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from preftune.batching.layout import LayoutName
from preftune.config.composed import ComposedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.jobs import JobsConfig
from preftune.config.model import AttentionName
from preftune.distributed.folders import PROBE
from preftune.errors import CheckpointError
from preftune.files import refuse_if_held, write_atomically
from preftune.redaction import redacted_values
from preftune.training.integrity import MANIFEST, STATE, read_document

# What may differ between the command that started a run and the one that goes on with it.
MAY_CHANGE = frozenset(
    {
        "num_epochs",
        "max_train_steps",
        "logging_steps",
        "exp_name",
        "run_name",
        "report_to",
        "progress",
        "num_proc",
        "dataset_cache_mode",
        "cache_dataset_only",
        "checkpointing_steps",
        "keep_last_n_checkpoints",
        "checkpoint_max_gb",
        "checkpoint_async",
        "metric_for_best_model",
        "greater_is_better",
        "early_stopping_patience",
        "early_stopping_threshold",
        "load_best_model_at_end",
        "eval_on_start",
        "sample_steps",
        "num_samples",
        "max_run_time",
        "collective_timeout",
        "resume",
        "output_dir",
        "cache_dir",
        "save_dtype",
        # A run may be pushed once it is finished.
        "push_to_hub",
        "hub_repo_id",
        "hub_private",
        "hub_revision",
        "hub_strategy",
        "on_nonfinite",
        "max_skipped_batches",
        # What a lack of memory is answered with: the same steps, to rounding. A checkpoint goes on
        # only with as many pairs a step as it was made with.
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "total_batch_size",
        "per_device_eval_batch_size",
        "max_tokens_per_microbatch",
        # What runs when training is over.
        *(field.name for field in fields(JobsConfig)),
        "gradient_checkpointing",
        "activation_offload",
        # How the same steps are spread over devices.
        "zero_stage",
        "offload_optimizer",
        "offload_param",
        "zero_hpz_partition_size",
        "fsdp",
        "fsdp_shard_size",
        "fsdp_reshard_after_forward",
        "fsdp_offload_params",
        "sequence_parallel_size",
    }
)
MAKER = "preftune"
STEP = r"step-[0-9]{8,}"
"""Names of checkpoints."""


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint in a run's folder, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


@dataclass(frozen=True)
class RunFolder:
    """Paths inside `output_dir`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, counts, status: `run.json`."""
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        """One line a logging step."""
        return self.root / "metrics.jsonl"

    @property
    def start_answers(self) -> Path:
        """What the policy answered before its first step."""
        return self.root / "start_answers.json"

    @property
    def checkpoints(self) -> Path:
        """Holds `step-00000100/` and so on."""
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        """One line a sampled prompt and step."""
        return self.root / "samples.jsonl"

    @property
    def results(self) -> Path:
        """What evaluations found of the model before training and after."""
        return self.root / "evaluation" / "results.json"

    @property
    def report(self) -> Path:
        """What the run was and what its curves say, as one HTML page."""
        return self.root / "report.html"

    @property
    def final(self) -> Path:
        """The trained model in the Hugging Face format."""
        return self.root / "final"

    @property
    def to_push(self) -> Path:
        """Checkpoints that wait to be pushed to a hub."""
        return self.root / ".to-push"

    def has_content(self) -> bool:
        """Whether anything lies there but what a kill during the first write left."""
        left = (".run.json.", PROBE)
        return any(not path.name.startswith(left) for path in self.root.iterdir())

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.checkpoints / f"step-{step:08d}"

    def list_checkpoints(self) -> list[Path]:
        """Checkpoints by step; half-written ones have another name.

        Neither times nor what lies inside count: one that lost a file is told when it is read.
        """
        return sorted(
            (path for path in self.checkpoints.glob("step-*") if re.fullmatch(STEP, path.name)),
            key=step_of,
        )

    def read_manifest(self) -> dict[str, Any]:
        """The run's manifest.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            manifest = json.loads(self.manifest.read_text())
            if not isinstance(manifest, dict) or not isinstance(manifest.get("config", {}), dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.manifest} cannot be read ({error}); give another --output_dir"
            ) from error
        return manifest

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest in one go."""
        text = json.dumps(redacted_values(manifest), indent=1, default=str) + "\n"
        write_atomically(self.manifest, text)


@dataclass(frozen=True)
class RunStart:
    """How a command may begin in its output folder."""

    folder: RunFolder
    kind: Literal["new", "resume", "finished"]
    checkpoint: Path | None = None
    """What to go on from; None starts at step 0."""

    @property
    def layout(self) -> LayoutName | None:
        """The forward layout that the run to go on with started with."""
        return self._chosen("layout")

    @property
    def attention(self) -> AttentionName | None:
        """The attention kernel that the run to go on with started with."""
        return self._chosen("attention")

    @property
    def model_commit(self) -> str | None:
        """The commit of the model that the run here started from, if it came from a hub."""
        return (self._noted("model") or {}).get("commit")

    @property
    def reference_commit(self) -> str | None:
        """The commit of a reference of its own, if that came from a hub."""
        return (self._noted("reference_model") or {}).get("commit")

    @property
    def adapter_commit(self) -> str | None:
        """The commit of the adapter that the run here goes on training, if it came from a hub."""
        return (self._noted("model") or {}).get("adapter_commit")

    def _chosen(self, key: str) -> Any:
        # A checkpoint may be of another folder, whose choices then go on here.
        if self.checkpoint is not None:
            return read_document(self.checkpoint)["identity"].get(key)
        return self._noted(key)

    def _noted(self, key: str) -> Any:
        if self.kind == "new" or not self.folder.manifest.is_file():
            return None
        return self.folder.read_manifest().get(key)


def plan_start(config: ExperimentConfig, *, held: bool = False) -> RunStart:
    """Decide how to begin, from what lies on disk; changes nothing there.

    Args:
        config: of the run.
        held: whether this process has locked the folder.

    Raises:
        CheckpointError: the folder holds something else, another configuration, or no checkpoint
            where one was asked for; or another process works there.
    """
    folder = RunFolder(Path(config.output_dir).expanduser())
    explicit = None if config.resume in ("auto", "never") else Path(config.resume).expanduser()
    if explicit is not None:
        _check_checkpoint(config, explicit)
    check_writable("output_dir", folder.root)
    if not folder.root.exists() or not folder.has_content():
        return RunStart(folder, "resume" if explicit else "new", explicit)
    if config.resume == "never":
        raise CheckpointError(
            f"output_dir {config.output_dir!r} is not empty and resume is 'never'; "
            "give a new --output_dir, or --resume auto to go on with the run there"
        )
    if not folder.manifest.is_file():
        names = ", ".join(sorted(p.name for p in folder.root.iterdir())[:5])
        raise CheckpointError(
            f"output_dir {config.output_dir!r} holds files that are not a preftune run's "
            f"({names}); nothing there was changed; give a new or empty --output_dir"
        )
    start = _go_on(config, folder, explicit)
    if start.kind != "finished" and not held:
        refuse_if_held(folder.root)
    return start


def _go_on(config: ExperimentConfig, folder: RunFolder, explicit: Path | None) -> RunStart:
    manifest = folder.read_manifest()
    if manifest.get("made_by") != MAKER:
        raise CheckpointError(
            f"{folder.manifest} was not written by preftune; give a new or empty --output_dir"
        )
    _check_same_config(config, manifest.get("config", {}), str(folder.root))
    if manifest.get("status") == "finished":
        _check_nothing_left(config, manifest)
        return RunStart(folder, "finished")
    checkpoints = folder.list_checkpoints()
    if explicit is not None and manifest.get("resumed_from") == str(explicit.resolve()):
        # The same command again: the branch made from that checkpoint goes on.
        return RunStart(folder, "resume", (checkpoints or [explicit])[-1])
    if explicit is None:
        return RunStart(folder, "resume" if checkpoints else "new", (checkpoints or [None])[-1])
    step = read_document(explicit)["step"]
    if any(step_of(path) > step for path in checkpoints):
        raise CheckpointError(
            f"resume is {str(explicit)!r}, but {config.output_dir!r} already holds the later "
            f"{checkpoints[-1].name}; give a new --output_dir to branch off there, or --resume auto"
        )
    return RunStart(folder, "resume", explicit)


def _check_nothing_left(config: ExperimentConfig, manifest: Mapping[str, Any]) -> None:
    before = manifest.get("config", {})
    for key in ("num_epochs", "max_train_steps"):
        if config.to_dict().get(key) != before.get(key):
            raise CheckpointError(
                f"the run in {config.output_dir!r} is finished, with {key} {before.get(key)}; to "
                f"train on with {key} {config.to_dict().get(key)}, give a new --output_dir and "
                "--resume PATH of its last checkpoint"
            )


def _check_checkpoint(config: ExperimentConfig, path: Path) -> None:
    if not any((path / name).is_file() for name in (MANIFEST, STATE)):
        raise CheckpointError(
            f"resume is {config.resume!r}: no complete checkpoint is there (it would hold a "
            f"{MANIFEST}); give auto, never or a folder such as RUN/checkpoints/step-00000100"
        )
    _check_same_config(config, read_document(path)["config"], str(path))


def check_writable(key: str, path: Path) -> Path:
    """The nearest existing folder of `path`, which is one or is to become one.

    Raises:
        CheckpointError: a file stands in the way, or the folder cannot be written to.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise CheckpointError(f"{key} is {str(path)!r}, but {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise CheckpointError(
            f"{key} is {str(path)!r}: {existing} is not writable; give another --{key}"
        )
    return existing


def _check_same_config(config: ExperimentConfig, before: Mapping[str, Any], where: str) -> None:
    changed = changed_settings(before, config, MAY_CHANGE)
    if changed:
        raise CheckpointError(
            f"{where} belongs to a run with another configuration: {'; '.join(changed)}. "
            "Nothing was changed; give a new --output_dir, or the same values to go on"
        )


def changed_settings(
    before: Mapping[str, Any], config: ComposedConfig, may_change: Collection[str]
) -> list[str]:
    """What differs from the settings that work was begun with: `KEY was x, now y`.

    Args:
        before: as written then.
        config: of now.
        may_change: settings that may differ.
    """
    now = as_written(config)
    return [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted((now.keys() | before.keys()) - set(may_change))
        if now.get(key) != before.get(key)
    ]


def as_written(config: ComposedConfig) -> dict[str, Any]:
    """The settings as JSON gives them back, without secrets."""
    return redacted_values(json.loads(json.dumps(config.to_dict(), default=str)))


def new_run_id() -> str:
    """What tells a run from every other, wherever its folder goes."""
    return secrets.token_hex(8)


def new_manifest(config: ExperimentConfig) -> dict[str, Any]:
    """The part of the manifest that is known before anything loads."""
    return {
        "made_by": MAKER,
        "run_id": new_run_id(),
        "status": "running",
        "config": as_written(config),
        "command": sys.argv,
        "pid": os.getpid(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("preftune", "torch", "transformers", "accelerate")},
        },
        "host": {"platform": platform.platform(), "machine": platform.machine()},
    }
