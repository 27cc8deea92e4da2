"""That all ranks of a run start from the same: code, options, data, model, and folders."""

from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import xxhash

import preftune
from preftune.config.composed import ComposedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.data.pairs import PairDataset
from preftune.distributed.folders import look_at_folder
from preftune.distributed.runtime import Runtime
from preftune.errors import CheckpointError
from preftune.redaction import redacted_values
from preftune.training.run_folder import RunStart

MAY_DIFFER = frozenset({"cache_dir", "num_proc", "progress"})
"""Options that may have another value on another host."""


def agree_on_start(config: ComposedConfig, runtime: Runtime) -> None:
    """See that code, packages, options and devices are the same on all ranks.

    Raises:
        ConfigError: they are not; on every rank, with the hosts that differ.
    """
    if runtime.world_size == 1:
        return
    runtime.meet()
    runtime.agree(
        {
            "the version of preftune": preftune.__version__,
            "the source of preftune (its hash)": _source_hash(),
            **{
                f"the version of {name}": version(name)
                for name in ("torch", "transformers", "accelerate")
            },
        },
        "install the same on all hosts",
    )
    runtime.agree(
        {
            "the type of device": runtime.device.type,
            "the precision that mixed_precision stands for": runtime.precision,
        },
        "give all ranks the same kind of device, and --mixed_precision fp32, bf16 or fp16",
    )
    options = redacted_values(config.to_dict())
    runtime.agree(
        {key: value for key, value in options.items() if key not in MAY_DIFFER},
        "give all ranks the same options",
    )


def _source_hash() -> str:
    digest = xxhash.xxh3_128()
    root = Path(str(files(preftune)))
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}|".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def agree_on_data(datasets: Mapping[str, PairDataset], runtime: Runtime) -> None:
    """See that all ranks read the same rows.

    Args:
        datasets: by what they are for.
        runtime: the ranks.

    Raises:
        ConfigError: they do not; on every rank.
    """
    if runtime.world_size == 1:
        return
    runtime.agree(
        {
            f"the data {label} ({dataset.name})": (
                f"{len(dataset.examples)} rows with hash {dataset.examples.fingerprint()}"
            )
            for label, dataset in datasets.items()
        },
        "give all hosts the same files",
    )


def agree_on_model(name: str, fields: Mapping[str, Any], runtime: Runtime) -> None:
    """See that all ranks have loaded the same model, and compute with it alike.

    Args:
        name: what the user calls it.
        fields: what its log-probs depend on.
        runtime: the ranks.

    Raises:
        ConfigError: they have not; on every rank.
    """
    runtime.agree(
        {f"{name}: {key}": value for key, value in fields.items()},
        "give all hosts the same model files and packages",
    )


def check_output_is_seen(config: ExperimentConfig, start: RunStart, runtime: Runtime) -> None:
    """Refuse a folder for checkpoints that some rank does not see.

    Raises:
        CheckpointError: on every rank, with the first host that does not see it.
    """
    if runtime.world_size == 1 or (config.checkpointing_steps is None and not start.checkpoint):
        return
    seen = look_at_folder(runtime, "output_dir", start.folder.root)
    if seen.is_shared:
        return
    rank = next(rank for rank, leader in enumerate(seen.leaders) if leader)
    raise runtime.share(
        CheckpointError(
            f"output_dir is {config.output_dir!r}: what rank 0 (host {seen.hosts[0]}) writes there "
            f"is not seen by rank {rank} (host {seen.hosts[rank]}), and every rank must see the "
            "checkpoints; give a folder on a file system that all hosts share, or "
            "--checkpointing_steps null for a run without checkpoints"
        )
    )
