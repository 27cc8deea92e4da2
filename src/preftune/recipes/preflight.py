"""`preftune check`: everything that can be found wrong before weights load."""

import os
import shutil

import numpy as np

from preftune.batching.sampler import PairSampler
from preftune.config.experiment import ExperimentConfig
from preftune.config.paths import cache_root
from preftune.data.pairs import PairDataset
from preftune.recipes.dpo import count_steps
from preftune.recipes.pairs import describe_counts, load_experiment_pairs, prepare_tokenizer
from preftune.tracking.progress import ProgressDisplay
from preftune.tracking.tracker import check_trackers
from preftune.training.run_folder import check_writable, plan_start


def check(config: ExperimentConfig) -> str:
    """Validate configuration, output folder, tokenizer and every row; load no weights.

    Args:
        config: of the run that would follow.

    Returns:
        What the run would do, for people.

    Raises:
        PreftuneError: the first thing that would stop the run.
    """
    start = plan_start(config)
    writable = check_writable("output_dir", start.folder.root)
    check_writable("cache_dir", cache_root(config.cache_dir))
    check_trackers(config.report_to)
    tokenizer = prepare_tokenizer(config)
    display = ProgressDisplay("none")
    pairs = load_experiment_pairs(config, tokenizer, display)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    batch = config.global_batch_size(world_size)
    sampler = PairSampler(
        len(pairs.train.examples), batch, config.resolved_data_seed, config.shuffle
    )
    steps = count_steps(config, sampler)
    lines = [
        config.to_yaml().rstrip(),
        "",
        describe_counts(pairs.train),
        *map(describe_counts, pairs.held_out.values()),
        _describe_lengths(pairs.train),
        f"pairs a step: {batch} = {config.per_device_train_batch_size} x "
        f"{config.gradient_accumulation_steps} accumulated x {world_size} processes",
        f"steps: {steps} ({sampler.steps_per_epoch} an epoch)",
        f"output_dir: {start.folder.root} ({start.kind}), "
        f"{shutil.disk_usage(writable).free / 2**30:.1f} GiB free",
        "check passed: nothing was loaded or written",
    ]
    return "\n".join(lines)


def _describe_lengths(dataset: PairDataset) -> str:
    lengths = dataset.examples.longest_side
    return (
        f"tokens: {dataset.examples.num_tokens} an epoch as both sides are forwarded; longest side "
        f"of a pair: median {int(np.median(lengths))}, longest {lengths.max()}"
    )
