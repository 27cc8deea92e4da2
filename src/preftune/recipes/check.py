"""`preftune check`: everything that can be found wrong before weights load, all at once."""

import os
import shutil
from copy import copy

import numpy as np
import torch

from preftune.batching.sampler import PairSampler
from preftune.config.experiment import ExperimentConfig
from preftune.data.pairs import PairDataset
from preftune.data.sources import open_source
from preftune.data.transforms import load_transforms
from preftune.distributed.runtime import resolve_precision
from preftune.distributed.sequence import num_groups
from preftune.errors import Findings
from preftune.recipes.lint import risky_settings
from preftune.recipes.pairs import Pairs, describe_counts, load_experiment_pairs, over_budget
from preftune.recipes.preflight import (
    look_at_cache,
    look_at_model,
    look_at_output,
    slow_settings,
)
from preftune.recipes.train import count_steps
from preftune.tracking.progress import ProgressDisplay
from preftune.training.run_folder import RunStart, check_writable


def check(config: ExperimentConfig) -> str:
    """Look at folders, device, tokenizer and every row; load no weights.

    Args:
        config: of the run that would follow.

    Returns:
        What the run would do, for people.

    Raises:
        PreftuneError: with everything that would stop the run.
    """
    findings = Findings()
    start = look_at_output(config, findings)
    if not look_at_cache(config, findings):
        # The rows are looked at all the same.
        config = copy(config)
        config.dataset_cache_mode = "off"
    found = look_at_model(config, findings, start)
    pairs, lengths = None, []
    if found is None:
        _look_for_data(config, findings)
    else:
        with findings:
            pairs = load_experiment_pairs(*found, ProgressDisplay("none"))
            lengths = _describe_run(found[0], pairs.train)
    findings.raise_all()
    assert start is not None  # or there was a finding
    assert pairs is not None
    return "\n".join([*_describe_data(pairs), *lengths, *_describe_machine(config, start)])


def _look_for_data(config: ExperimentConfig, findings: Findings) -> None:
    """Without a tokenizer, rows cannot become tokens; that they are there can be told all the same.

    Args:
        config: names the data.
        findings: gets what is wrong.
    """
    with findings:
        load_transforms(config.dataset_transforms or ())
    wanted = [(name, config.dataset_split) for name, _ in config.sources]
    wanted += [(name, config.eval_split or "test") for name in config.eval_sources.values()]
    for name, split in wanted:
        with findings:
            open_source(name, split)


def _describe_data(pairs: Pairs) -> list[str]:
    held_out = [
        f"held out{label and f' ({label})'}: {describe_counts(dataset)}"
        for label, dataset in pairs.held_out.items()
    ]
    return [describe_counts(pairs.train), *held_out]


def _describe_run(config: ExperimentConfig, train: PairDataset) -> list[str]:
    """Batch size, steps, tokens, and what is known to break.

    Raises:
        ConfigError: the warm-up would take all steps, or the processes do not make groups.
    """
    size = config.sequence_parallel_size
    # Without a launcher: as many as it takes.
    shares = num_groups(int(os.environ.get("WORLD_SIZE", size)), size)
    batch = config.global_batch_size(shares)
    sampler = PairSampler(len(train.examples), batch, config.resolved_data_seed, config.shuffle)
    steps, an_epoch = count_steps(config, sampler), sampler.steps_per_epoch
    tokens, lengths = train.examples.num_tokens, train.examples.longest_side
    about = "about " if steps % an_epoch else ""
    once, side = "for both sides", "the longer side of a pair"
    if train.examples.num_answers == 1:
        once, side = "once an answer", "a prompt and its answer"
    return [
        f"{train.unit} a step: {batch} = {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} accumulated x {shares} "
        + ("processes" if size == 1 else f"groups of {size} processes"),
        f"steps: {steps} ({an_epoch} an epoch)",
        f"tokens, each prompt counted {once}: {about}{round(tokens * steps / an_epoch)} "
        f"({tokens} an epoch)",
        f"tokens of {side}: median {int(np.median(lengths))}, longest {lengths.max()}",
        *over_budget(config, train),
        *risky_settings(config, steps / an_epoch),
    ]


def _describe_machine(config: ExperimentConfig, start: RunStart) -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    writable = check_writable("output_dir", start.folder.root)
    return [
        f"device: {device}, products in {resolve_precision(config.mixed_precision)}",
        *slow_settings(config, config.mixed_precision),
        f"output_dir: {start.folder.root} ({start.kind}), "
        f"{shutil.disk_usage(writable).free / 2**30:.1f} GiB free",
        "check passed: no weights were loaded, nothing but the cache was written",
    ]
