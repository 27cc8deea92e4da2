"""From the raw record of a setting to its numbers. Pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from .arms import Arm
from .counts import Lengths, ModelShape, needed_flops, step_flops, token_counts, work_of


def batches_of(setting: dict[str, Any], arm: Arm) -> list[list[Lengths]]:
    """The batches that an arm trained on, warm-up left out."""
    order = setting["pairs"]["sorted" if arm.is_sorted else "random"]["batches"]
    return [[Lengths(*pair) for pair in batch] for batch in order][setting["warmup"] :]


def arm_flops(setting: dict[str, Any], arm: Arm) -> float:
    """Arithmetic of an arm's timed steps, as the tool runs them."""
    shape = ModelShape(**setting["model"]["shape"])
    return sum(
        step_flops(
            work_of(batch, arm.layout),
            shape,
            checkpointing=arm.checkpointing,
            online_reference=arm.online_reference,
        )
        for batch in batches_of(setting, arm)
    )


def summarise(setting: dict[str, Any], arms: Sequence[Arm], clock: str) -> list[dict[str, Any]]:
    """The numbers of each arm that was measured.

    Args:
        setting: its record: `runs`, `rates`, `pairs`, `model`, `batch_size`, `warmup`.
        arms: in the order of the table.
        clock: what ratios compare, `cpu` or `wall` seconds.
    """
    by_name = {arm.name: arm for arm in arms}
    rows = []
    for arm in arms:
        runs = runs_of(setting, arm.name)
        errors = [
            run["error"] for run in setting["runs"] if run["arm"] == arm.name and "error" in run
        ]
        if not runs:
            rows.append({"arm": arm.name, "error": errors[0] if errors else "not run"})
            continue
        row = _own_numbers(setting, arm, runs, clock)
        baseline = by_name.get(arm.baseline)
        others = runs_of(setting, arm.baseline)
        if baseline is not None and others:
            row |= _against(setting, arm, runs, baseline, others, clock)
        rows.append(row)
    return rows


def runs_of(setting: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The finished runs of an arm."""
    return [run for run in setting["runs"] if run["arm"] == name and "error" not in run]


def _own_numbers(
    setting: dict[str, Any], arm: Arm, runs: list[dict[str, Any]], clock: str
) -> dict[str, Any]:
    per_pair = {name: [_seconds_per_pair(setting, run, name) for run in runs] for name in CLOCKS}
    batches = batches_of(setting, arm)
    shape = ModelShape(**setting["model"]["shape"])
    pairs = sum(len(batch) for batch in batches)
    needed = sum(needed_flops(batch, shape) for batch in batches) / pairs
    precision = "bf16" if arm.precision == "bf16" or setting["bf16"] else "fp32"
    shares = []
    for run, seconds in zip(runs, per_pair[clock], strict=True):
        rates = setting["rates"][run["round"]][precision]
        shares.append(needed / seconds / max(rate[clock] for rate in rates.values()))
    passes = [run["reference_pass"][clock] for run in runs if run.get("reference_pass")]
    num_read = pairs + setting["batch_size"] * setting["warmup"]
    return {
        "arm": arm.name,
        "repeats": len(runs),
        "seconds_per_pair": {
            name: {"median": statistics.median(values), "minimum": min(values)}
            for name, values in per_pair.items()
        },
        "first_step_seconds": statistics.median(run[clock][0] for run in runs),
        "peak_gib": statistics.median(run["peak_mib"] for run in runs) / 1024,
        "share_of_products": statistics.median(shares),
        "needed_flops_per_pair": needed,
        "reference_seconds_per_pair": statistics.median(passes) / num_read if passes else None,
    }


CLOCKS = ("cpu", "wall")


def _seconds_per_pair(setting: dict[str, Any], run: dict[str, Any], clock: str) -> float:
    timed = run[clock][setting["warmup"] :]
    return sum(timed) / (len(timed) * setting["batch_size"])


def _against(
    setting: dict[str, Any],
    arm: Arm,
    runs: list[dict[str, Any]],
    baseline: Arm,
    others: list[dict[str, Any]],
    clock: str,
) -> dict[str, Any]:
    theirs = {run["round"]: run for run in others}
    same_round = [(run, theirs[run["round"]]) for run in runs if run["round"] in theirs]
    if not same_round:
        return {}
    time = statistics.median(
        _seconds_per_pair(setting, run, clock) / _seconds_per_pair(setting, other, clock)
        for run, other in same_round
    )
    memory = statistics.median(run["peak_mib"] / other["peak_mib"] for run, other in same_round)
    found = {"baseline": baseline.name, "time_ratio": time, "memory_ratio": memory}
    if arm.precision == baseline.precision:
        predicted = arm_flops(setting, arm) / arm_flops(setting, baseline)
        found |= {"predicted_ratio": predicted, "measured_over_predicted": time / predicted}
    return found


def counts_per_pair(setting: dict[str, Any], arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Mean tokens of a pair, by order of the pairs."""
    found = {}
    for name in ("random", "sorted"):
        arm = next((a for a in arms if a.is_sorted == (name == "sorted")), None)
        if arm is not None:
            batches = batches_of(setting, arm)
            pairs = sum(len(batch) for batch in batches)
            found[name] = {k: v / pairs for k, v in token_counts(batches).items()}
    return found


def predicted_seconds(setting: dict[str, Any], arm: Arm, rate: float) -> float:
    """Wall time that the steps of an arm will take, its reference pass included.

    Args:
        setting: with model and pairs.
        arm: which.
        rate: that training reaches, operations a second of wall time.
    """
    timed = arm_flops(setting, arm)
    all_steps = timed * (1 + setting["warmup"] / len(batches_of(setting, arm)))
    reference = 0.0 if arm.online_reference else all_steps / 3
    return (all_steps + reference) / rate
