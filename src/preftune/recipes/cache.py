"""`preftune cache`: the reference log-probs of runs, built ahead, verified and exported."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.cache import CacheExportConfig, CacheVerifyConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.config.paths import cache_root
from preftune.data.table import TokenRows
from preftune.distributed.folders import look_at_folder
from preftune.distributed.runtime import AUTOCAST, Runtime, resolve_precision
from preftune.errors import CacheError, CheckpointError, ConfigError, Findings
from preftune.files import replacing
from preftune.model.adapters import StartAdapter
from preftune.model.layout_probe import rounded_to
from preftune.recipes.pairs import Pairs, load_experiment_pairs, prepare_tokenizer
from preftune.recipes.preflight import look_at_cache, look_at_model, slow_settings
from preftune.recipes.reference import Reference, open_reference, rows_to_score, stage_name
from preftune.recipes.same_start import agree_on_data, agree_on_start
from preftune.recipes.start_model import StartModel
from preftune.reference.agreement import Recomputed, recompute
from preftune.reference.build import Answer, Scorer, answers_of
from preftune.reference.namespaces import find_namespaces, one_namespace
from preftune.reference.store import StoredLogps, read_shard, shards_in
from preftune.tracking.progress import ProgressDisplay
from preftune.training.restore import taken_at_start
from preftune.training.run_folder import RunFolder, RunStart, check_writable, plan_start

LISTED = 20
"""Most answers that a message names."""


def build(config: ExperimentConfig) -> str:
    """Compute the reference log-probs that a run would compute first; train nothing.

    Args:
        config: of the run.

    Returns:
        What was computed and where it is, for people.

    Raises:
        PreftuneError: what would stop the run before its first step.
    """
    reference, pairs, _ = _open(config)
    lines = []
    for label, rows in rows_to_score(config, pairs).items():
        values = reference.logps(rows, stage_name(label))
        number = values.num_computed + values.num_reused
        lines.append(
            f"{stage_name(label)}: {number} answers, {values.num_computed} computed, "
            f"{values.num_reused} reused"
        )
    return "\n".join([*lines, f"log-probs are in {reference.store.folder}"])


def _open(config: ExperimentConfig) -> tuple[Reference, Pairs, bool]:
    """A run's reference and rows, as the run itself would open them.

    Returns:
        Both, and whether weights and products are fp32.

    Raises:
        PreftuneError: what would stop the run, or its loss reads no stored reference.
    """
    if not config.stores_reference:
        named = ", ".join(loss.value for loss in config.loss_types)
        why = "sync_reference is true" if config.sync_reference else f"the loss is {named}"
        why = why if config.stage == "dpo" else f"stage is {config.stage}"
        raise ConfigError(f"{why}, so no reference log-probs are stored for this run")
    runtime = Runtime(resolve_precision(config.mixed_precision), config.seed)
    agree_on_start(config, runtime)
    start = runtime.decide(lambda: _start_of(config))

    def look() -> tuple[ExperimentConfig, PreTrainedTokenizerBase]:
        findings = Findings()
        look_at_cache(config, findings)
        found = look_at_model(config, findings, start)
        findings.raise_all()
        assert found is not None  # or there was a finding
        return found

    pinned, tokenizer = runtime.together(look)
    cache = look_at_folder(runtime, "cache_dir", cache_root(config.cache_dir))
    display = ProgressDisplay(config.progress, is_main=runtime.is_main)
    for sentence in slow_settings(config, config.mixed_precision):
        display.say(sentence)
    pairs = runtime.leaders_first(
        lambda: load_experiment_pairs(pinned, tokenizer, display),
        is_leader=cache.leads(runtime.rank),
    )
    agree_on_data(pairs.by_use, runtime)
    display.say(f"loading {config.model_name_or_path}")
    model = StartModel.load(
        pinned,
        runtime,
        is_cut=config.shards_weights,
        adapter=StartAdapter.of(pinned, config.seed, taken_at_start(start.checkpoint)),
    )
    layout = model.lay_out(
        start.layout or config.wanted_layout,
        start.attention or config.attn_implementation,
        pairs.longest_side,
    )
    fields, policy = model.identify(layout), model.loaded.policy
    runtime.spread_frozen(policy, config)
    reference = open_reference(pinned, policy, fields, layout, pairs, cache, runtime, display)
    is_exact = rounded_to(policy, AUTOCAST[runtime.precision]) == torch.float32
    return reference, pairs, is_exact


def _start_of(config: ExperimentConfig) -> RunStart:
    with suppress(CheckpointError):  # the folder is another run's, or none's: nothing to follow
        return plan_start(config)
    return RunStart(RunFolder(Path(config.output_dir)), "new")


# ---------------------------------------------------------------- verify


def verify(config: CacheVerifyConfig) -> str:
    """Read every shard of a run's namespace, and score a sample of its answers again.

    Args:
        config: of the run, and how much to score.

    Returns:
        What was looked at, for people.

    Raises:
        CacheError: with all that is damaged, or else with all that differs.
    """
    reference, pairs, is_exact = _open(config)
    if reference.runtime.world_size > 1:
        raise reference.runtime.share(
            ConfigError("preftune cache verify runs on one process; start it without torchrun")
        )
    stored, num_shards = _read_all(reference.store.folder)
    rng = np.random.default_rng(config.verify_seed)
    known: list[tuple[TokenRows, Answer]] = []
    number = 0
    for rows in rows_to_score(config, pairs).values():
        answers = answers_of(rows)[1]
        number += len(answers)
        known += [(rows, answer) for answer in answers.values() if answer.key in stored]
    if not known:
        raise CacheError(
            f"none of this run's {number} answers is in {reference.store.folder}; fill it with "
            "preftune cache build"
        )
    chosen = rng.permutation(len(known))[: config.verify_samples]
    assert reference.model is not None
    scorer = Scorer(reference.model.eval(), reference.layout, reference.runtime.device)
    found: list[tuple[TokenRows, Recomputed]] = []
    for rows in {id(rows): rows for rows, _ in known}.values():
        sample = [known[i][1] for i in chosen if known[i][0] is rows]
        again = recompute(scorer, rows, sample, stored, is_exact=is_exact)
        found += [(rows, one) for one in again]
    _check_agreement(found, reference.store.folder)
    worst = max(one.share for _, one in found)
    return "\n".join(
        [
            f"{num_shards} shards read, none damaged",
            f"{len(known)} of this run's {number} answers are stored",
            f"{len(found)} scored again: the largest difference is {worst:.2g} of what is allowed",
            f"verified: {reference.store.folder}",
        ]
    )


def _read_all(folder: Path) -> tuple[dict[bytes, StoredLogps], int]:
    """Every entry, and the number of shards; tells all that are damaged at once."""
    findings, entries, shards = Findings(), {}, shards_in(folder)
    for path in shards:
        with findings:
            entries = read_shard(path) | entries
    findings.raise_all()
    return entries, len(shards)


def _check_agreement(found: list[tuple[TokenRows, Recomputed]], folder: Path) -> None:
    differing = [
        f"the {rows[one.answer.row].roles[one.answer.side]} answer of "
        f"{rows[one.answer.row].row_id}: {one.stored:.6f} stored, {one.now:.6f} now, may differ by "
        f"{one.allowed:.2g}"
        for rows, one in found
        if not one.share <= 1
    ]
    if differing:
        more = [f"and {len(differing) - LISTED} more"] if len(differing) > LISTED else []
        raise CacheError(
            [
                f"{len(differing)} of {len(found)} answers that were scored again differ; what is "
                f"stored is not of this model: delete {folder}, and it is computed again",
                *differing[:LISTED],
                *more,
            ]
        )


# ---------------------------------------------------------------- export


@dataclass
class _Columns:
    """Of the exported table."""

    key: list[str]
    total: list[float]
    per_token: list[np.ndarray]
    named: dict[str, list[str]]

    def add(self, key: bytes, logps: StoredLogps, **names: str) -> None:
        self.key.append(key.hex())
        self.total.append(logps.sum)
        self.per_token.append(logps.per_token)
        for name, value in names.items():
            self.named.setdefault(name, []).append(value)

    def table(self) -> pa.Table:
        per_token = pa.array(self.per_token, type=pa.list_(pa.float32()))
        columns = {"key": self.key, "sum": self.total, "per_token": per_token}
        return pa.table(self.named | columns)


def export(config: CacheExportConfig) -> str:
    """Write stored log-probs to one parquet file.

    Args:
        config: which, and where to.

    Returns:
        What was written, for people.

    Raises:
        PreftuneError: the namespace cannot be found or read, or the file not be written.
    """
    assert config.output is not None  # the config refuses an unset one
    output = Path(config.output).expanduser()
    check_writable("output", output.parent)
    if output.exists():
        raise ConfigError(f"output is {config.output!r}, which exists; give another name")
    run = None if config.rows_of is None else parse_config(ExperimentConfig, [config.rows_of])
    cache_dir = cache_root(config.cache_dir or (run and run.cache_dir))
    prefix = config.namespace or (_namespace_of(run) if run is not None else "")
    namespace = one_namespace(find_namespaces(cache_dir), prefix)
    stored, _ = _read_all(namespace.folder)
    columns, num_missing = _Columns([], [], [], {}), 0
    if run is None:
        for key, logps in stored.items():
            columns.add(key, logps)
    else:
        num_missing = _add_rows(columns, run, stored)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        pq.write_table(columns.table(), temporary)
    text = f"{len(columns.key)} answers of {namespace.name} written to {config.output}"
    return text + (f"; {num_missing} of the run's are not stored" if num_missing else "")


def _namespace_of(run: ExperimentConfig) -> str:
    """What the run's manifest notes; empty without a run there."""
    with suppress(CheckpointError):
        manifest = RunFolder(Path(run.output_dir).expanduser()).read_manifest()
        return str(manifest.get("reference_namespace", ""))
    return ""


def _add_rows(columns: _Columns, run: ExperimentConfig, stored: dict[bytes, StoredLogps]) -> int:
    """Add the answers of a run's rows; gives how many are not stored."""
    pairs = load_experiment_pairs(run, prepare_tokenizer(run), ProgressDisplay(run.progress))
    num_missing = 0
    for label, rows in rows_to_score(run, pairs).items():
        dataset = "train" if label is None else f"held_out/{label}".rstrip("/")
        for row, keys in zip(rows, answers_of(rows)[0], strict=True):
            for key, role in zip(keys, row.roles, strict=True):
                if key in stored:
                    columns.add(key, stored[key], dataset=dataset, row_id=row.row_id, role=role)
                else:
                    num_missing += 1
    return num_missing
