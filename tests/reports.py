"""Folders of runs that never ran, for tests of reports: curves made by hand."""

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert('pwned')</script>&amp; \"quoted\" ☃"
"""What a prompt may hold."""


def manifest(**changes: Any) -> dict[str, Any]:
    """A run.json with what reports read."""
    counts = {"read": 420, "kept": 400, "not_drawn": 0, "truncated": 3}
    counts |= {"dropped": {"empty answer": 12, "over length": 8}}
    counts |= {"dropped_rows": [[f"pairs.jsonl:{row}", "empty answer"] for row in range(20)]}
    lengths = {"shortest": 3, "median": 31, "95 % below": 80, "longest": 121}
    about = {"name": "/data/pairs.jsonl", "fingerprint": "5d1", "num_pairs": 400, "sources": []}
    about |= {"num_tokens": {"prompt": lengths, "chosen": lengths, "rejected": lengths}}
    return {
        "made_by": "preftune",
        "status": "finished",
        "config": {
            "run_name": "polite__42",
            "model_name_or_path": "/models/SmolLM2-135M-Instruct",
            "loss_type": "dpo",
            "beta": 0.1,
            "learning_rate": 5e-6,
            "output_dir": "/runs/polite",
        },
        "versions": {"preftune": "0.1.0", "torch": "2.13.0"},
        "host": {"platform": "Linux", "machine": "x86_64"},
        "device": "cpu",
        "world_size": 1,
        "steps": 100,
        "global_batch_size": 8,
        "seconds": 312.5,
        "data": {"train": about | counts, "held_out": about | counts | {"num_pairs": 100}},
        "model": {"parameters": 134_515_008, "trainable_parameters": 134_515_008},
        "warnings": [],
        "skipped_batches": [],
        **changes,
    }


def learned(part: float, noise: Callable[[], float]) -> dict[str, float]:
    """Training metrics of a healthy run when `part` of it is done."""
    margin = 0.8 * (1 - math.exp(-4 * part)) + 0.02 * noise()
    chosen = 0.25 * margin + 0.01 * noise()
    return {
        "loss": math.log1p(math.exp(-margin)) + 0.01 * noise(),
        "rewards/chosen": chosen,
        "rewards/rejected": chosen - margin,
        "rewards/margins": margin,
        "rewards/accuracies": min(1.0, 0.5 + 0.35 * (1 - math.exp(-6 * part)) + 0.02 * noise()),
        "logps/chosen": -85 + 6 * noise(),
        "logps/rejected": -92 + 6 * noise(),
        "logratios/chosen": 10 * chosen,
        "logratios/rejected": 10 * (chosen - margin),
        "logratios/displaced": 0.3 + 0.05 * noise(),
        "grad_norm": 4 - 2 * part + 0.4 * noise(),
        "learning_rate": 5e-6 * (1 - part),
        "epoch": 3 * part,
        "num_tokens": 40_000.0 * part,
        "perf/pairs_per_second": 9 + 0.3 * noise(),
        "perf/tokens_per_second": 2100 + 90 * noise(),
        "perf/step_seconds": 0.9 + 0.05 * noise(),
        "perf/peak_memory_gib": 2.1 + 0.2 * part,
    }


def held_out(part: float) -> dict[str, float]:
    """The same of its held-out pairs."""
    margin = 0.6 * (1 - math.exp(-4 * part))
    return {
        "eval/loss": math.log1p(math.exp(-margin)),
        "eval/rewards/margins": margin,
        "eval/rewards/accuracies": 0.5 + 0.3 * (1 - math.exp(-6 * part)),
        "eval/rewards/accuracies_length_matched": 0.5 + 0.28 * (1 - math.exp(-6 * part)),
        "eval/rewards/length_matched": 0.4,
        "eval/rewards/length_correlation": 0.1 + 0.1 * part,
        "eval/kl/forward": 3 * part,
        "eval/kl/forward_error": 0.2,
        "eval/source/helpful/rewards/accuracies": 0.5 + 0.4 * part,
        "eval/source/polite/rewards/accuracies": 0.5 + 0.2 * part,
    }


def healthy_lines(num_steps: int = 100, num_evaluations: int = 5) -> list[dict[str, float]]:
    """metrics.jsonl of a run in which nothing is wrong."""
    draw = random.Random(0)
    every = num_steps // num_evaluations
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, **learned(step / num_steps, lambda: draw.gauss(0, 1))}
        lines.append(line | (held_out(step / num_steps) if step % every == 0 else {}))
    return lines


def sample(step: int, number: int, prompt: str, policy: str) -> dict[str, Any]:
    """A line of samples.jsonl."""
    start = "I cannot help you with that, as I am a language model, a language model, a language"
    return {
        "step": step,
        "row_id": f"held.jsonl:{number}",
        "dataset": "held out",
        "source": "helpful",
        "prompt": prompt,
        "chosen": "Good morning! It would be a pleasure to help you with that.",
        "start": start,
        "policy": policy,
        "num_tokens": {"chosen": 14, "start": 20, "policy": 17},
        "repetition": {"chosen": 0.0, "start": 0.4, "policy": 0.0},
        "flags": {"start": ["cut", "repetitive"], "policy": []},
    }


def write_run(
    root: Path,
    lines: list[dict[str, float]],
    *,
    samples: list[dict[str, Any]] | None = None,
    documents: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A run's folder; `documents` are further files by name, `changes` of run.json."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "run.json").write_text(json.dumps(manifest(**changes)))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if samples is not None:
        text = "".join(json.dumps(row) + "\n" for row in samples)
        (root / "samples.jsonl").write_text(text)
    for name, document in (documents or {}).items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
    return root


def full_run(root: Path) -> Path:
    """A healthy run with everything that a folder may hold, told by hostile data."""
    side = {"value": 0.61, "stderr": 0.01, "file": "x.json"}
    row = {"job": "lm_eval", "task": "arc_easy", "metric": "acc", "higher_is_better": True}
    rate = {"num_pairs": 90, "rate": 0.62, "low": 0.52, "high": 0.71}
    return write_run(
        root,
        healthy_lines(),
        samples=[
            sample(step, number, prompt, f"{HOSTILE} after step {step}")
            for step in (20, 40, 60, 80, 100)
            for number, prompt in enumerate(
                ["How does someone say hello?", HOSTILE, "Hi\n\n\tthere"]
            )
        ],
        documents={
            "evaluation/results.json": [row | {"base": side, "trained": side | {"value": 0.58}}],
            "evaluation/win_rate.json": {"win_rate": rate, "wins": 50, "losses": 28, "ties": 12},
        },
        warnings=[
            {"step": 40, "kind": "grad_norm_spike", "value": 1, "threshold": 1, "text": HOSTILE}
        ],
        skipped_batches=[{"step": 7, "rows": [f"pairs.jsonl:{HOSTILE}"] * 12}],
    )
