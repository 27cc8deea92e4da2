"""How much arithmetic a run is, and how long that takes."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from preftune.config.gpus import known_gpu
from preftune.config.planning import CPU, PlanConfig
from preftune.planning.rows import PlannedRows
from preftune.planning.work import Work

MFU = 0.35
"""Share of a GPU's peak that is assumed where nothing is known."""


@dataclass(frozen=True)
class Arithmetic:
    """Operations of a training step, by what they grow with; a multiplication and an addition are
    two."""

    a_token: float
    """Matrix products of the layers, forward and backward, and once more where recomputed."""
    a_scored_token: float
    """The head."""
    an_attended_pair: float
    """A query and a key that it sees, in all layers."""

    def of(self, tokens: float, scored: float, pairs: float) -> float:
        """Of so many."""
        found = self.a_token * tokens + self.a_scored_token * scored
        return found + self.an_attended_pair * pairs


def arithmetic_of(work: Work, rows: PlannedRows, chosen: list[int], positions: int) -> Arithmetic:
    """From what one micro-batch did.

    Args:
        work: of that micro-batch.
        rows: all of them.
        chosen: those of the micro-batch.
        positions: its tokens.
    """
    scored = int(rows.num_scored[chosen].sum())
    pairs = float(rows.attention_pairs[chosen].sum())
    return Arithmetic(
        work.flops.get("other", 0) / positions,
        work.flops.get("head", 0) / max(scored, 1),
        work.flops.get("attention", 0) / max(pairs, 1.0),
    )


@dataclass(frozen=True)
class Duration:
    """How long a run takes, and where that is from."""

    tokens_per_second: float | None
    """Of all devices; None where nothing tells it."""
    step_seconds: float | None
    total_seconds: float | None
    source: str
    is_estimate: bool


def duration(
    config: PlanConfig,
    work: Arithmetic,
    rows: PlannedRows,
    *,
    rows_a_step: int,
    num_steps: int | None,
) -> Duration:
    """From a rate that was measured or given, or else from a share of the device's peak.

    Args:
        config: of the plan.
        work: of a token.
        rows: of the run.
        rows_a_step: of the global batch.
        num_steps: of the run; None where the dataset could not be read.
    """
    tokens = float(rows.num_tokens.mean()) * rows_a_step
    scored = float(rows.num_scored.mean()) * rows_a_step
    pairs = float(rows.attention_pairs.mean()) * rows_a_step
    gpu = known_gpu(config.device or "")
    if config.tokens_per_second is not None:
        rate, source, estimated = config.tokens_per_second, "--tokens_per_second", False
    elif config.measured_run is not None:
        rate, source, estimated = _measured(config.measured_run), config.measured_run, False
    elif gpu is not None:
        share = config.mfu or MFU
        peak = gpu.teraflops * 1e12 * config.num_processes
        rate = tokens * peak * share / work.of(tokens, scored, pairs)
        source = f"{share:.0%} of {gpu.teraflops:g} TFLOP/s a device, assumed"
        estimated = True
    else:
        what = "a CPU" if config.device in (None, CPU) else "this device"
        source = f"no rate is known of {what}: give --tokens_per_second or --measured_run"
        return Duration(None, None, None, source, True)
    seconds = tokens / rate
    total = None if num_steps is None else seconds * num_steps
    return Duration(rate, seconds, total, source, estimated or rows.is_worst_case)


def _measured(run: str) -> float:
    """The median over logged steps: the first ones are slower."""
    lines = (Path(run).expanduser() / "metrics.jsonl").read_text("utf-8").splitlines()
    found = [json.loads(line).get("perf/tokens_per_second") for line in lines]
    return median(rate for rate in found if rate)
