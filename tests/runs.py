"""Whole runs of `preftune train` on a tiny model, for tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import xxhash

from preftune import ExperimentConfig
from preftune.training.integrity import MANIFEST, STATE, checked_files, write_manifest
from preftune.training.tensor_files import FileSum, write_bytes
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

SHAPES = {
    "8x1": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "budget": {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_tokens_per_microbatch": 60,
    },
    "padded": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "forward_layout": "concatenated",
    },
}
"""Ways to cut the same global batch of 8."""


def tiny_model_folder(folder: Path) -> Path:
    """A random tiny Llama with its tokenizer, in the Hugging Face format."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_settings(root: Path, **overrides: Any) -> dict[str, Any]:
    """Options of a run of a few seconds under `root`; 21 pairs, batches of 8, 8 and 5."""
    model, data = root / "model", root / "pairs.jsonl"
    if not model.exists():
        tiny_model_folder(model)
    if not data.exists():
        write_jsonl(data, make_pairs(21, seed=0))
    settings = {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(root / "run"),
        "cache_dir": str(root / "cache"),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2.0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": None,
        "mixed_precision": "fp32",
        "progress": "none",
    }
    return settings | {key: _plain(value) for key, value in overrides.items()}


def tiny_config(root: Path, **overrides: Any) -> ExperimentConfig:
    """`tiny_settings` as a configuration."""
    return ExperimentConfig(**tiny_settings(root, **overrides))


def arguments(settings: dict[str, Any]) -> list[str]:
    """The same options as words of a command line."""
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key}", "null" if value is None else str(value))
    ]


def read_metrics(run: Path, *, with_perf: bool = False) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without timings unless asked."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if with_perf or "perf/" not in k} for x in lines]


def edit_state(checkpoint: Path, **changes: Any) -> None:
    """Change values of a checkpoint's state.json as if they had been written so."""
    document = json.loads((checkpoint / STATE).read_text()) | changes
    files = checked_files(checkpoint)
    files[STATE] = write_bytes(checkpoint / STATE, json.dumps(document).encode())
    write_manifest(checkpoint, files)


def reseal(checkpoint: Path) -> None:
    """Give a checkpoint that was tampered with a manifest that fits."""
    files = {
        path.name: FileSum(path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes()))
        for path in checkpoint.iterdir()
        if path.name != MANIFEST
    }
    write_manifest(checkpoint, files)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's state.json."""
    return json.loads((checkpoint / STATE).read_text())


def pretend_unfinished(run: Path, after: int | None = None) -> None:
    """Make a finished run's folder that of one that was killed shortly after a step's checkpoint.

    Args:
        run: its folder.
        after: the step; None leaves all checkpoints.
    """
    shutil.rmtree(run / "final", ignore_errors=True)
    for path in (run / "checkpoints").glob("step-*"):
        if after is not None and int(path.name.removeprefix("step-")) > after:
            shutil.rmtree(path)
    manifest = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
