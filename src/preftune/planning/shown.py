"""A plan for people, in 80 columns, and for machines."""

from dataclasses import asdict
from textwrap import fill
from typing import Any

from preftune.planning.fits import Change
from preftune.planning.result import Plan

_GIB = 2**30
_WIDTH = 80


def as_text(plan: Plan, change: Change | None) -> str:
    """For people.

    Args:
        plan: what was found.
        change: that makes it fit, if it does not.
    """
    lines = [*_parameters(plan), "", *_memory(plan), "", *_time(plan), "", *_disk(plan)]
    if plan.notes:
        lines += ["", *(fill(f"note: {note}", _WIDTH) for note in plan.notes)]
    return "\n".join([*lines, "", *_verdict(plan, change)])


def _parameters(plan: Plan) -> list[str]:
    found, config = plan.parameters, plan.config
    share = f"{found.trainable / found.total:.3%}" if config.use_lora else "all"
    lines = [
        f"model       {config.model_name_or_path}",
        f"parameters  {found.total:,}, {found.trainable:,} train ({share})",
    ]
    if found.quantized:
        bits = 4 if config.load_in_4bit else 8
        lines.append(f"            {found.quantized:,} of them in {bits} bits")
    lines += [
        f"            adapters of {name}: {number:,}"
        for name, number in found.lora_by_module.items()
    ]
    return lines


def _memory(plan: Plan) -> list[str]:
    config, fullest = plan.config, plan.division.fullest
    rows, forwards = len(plan.heaviest.rows), plan.heaviest.num_in_step
    number = config.num_processes
    devices = f"{number} x {plan.place.name}" if number > 1 else plan.place.name
    lines = [
        f"devices     {devices}, {_gib(plan.place.memory)} GiB each, {config.engine}, "
        f"{plan.place.precision} products",
        f"heaviest    {plan.heaviest.positions:,} tokens in {rows} row{'s' * (rows > 1)} "
        "a forward; "
        f"{forwards} forward{'s' * (forwards > 1)} a step",
        "",
        f"memory of a device, in GiB, at its most ({fullest.name}):",
    ]
    parts = {**fullest.parts, "process": plan.process}
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    lines += [f"  {name:<20} {_gib(size):>9}" for name, size in ordered]
    lines.append(f"  {'together':<20} {_gib(plan.peak):>9}")
    others = [held for held in plan.division.phases if held is not fullest]
    told = "; ".join(f"{held.name} {_gib(held.total + plan.process)}" for held in others)
    lines.append(fill(f"other phases: {told}", _WIDTH))
    if plan.division.host:
        host = ", ".join(f"{name} {_gib(size)}" for name, size in plan.division.host.items())
        lines.append(fill(f"in the memory of each host: {host}", _WIDTH))
    assumed = "process is measured, in this one; allocator is a tenth of what is not weights"
    if plan.place.is_gpu:
        assumed = "process (CUDA) and allocator (5 % of what is not weights) are assumed"
    return [*lines, fill(assumed, _WIDTH)]


def _time(plan: Plan) -> list[str]:
    time = plan.duration
    steps = "steps unknown" if plan.num_steps is None else f"{plan.num_steps:,} steps"
    if time.step_seconds is None:
        return [fill(f"time        {steps}; {time.source}", _WIDTH, subsequent_indent=" " * 12)]
    about = "estimate: " if time.is_estimate else ""
    line = f"time        {about}{time.step_seconds:.3g} s a step"
    if time.total_seconds is not None:
        line += f", {_hours(time.total_seconds)} for {steps}"
    line += f", at {time.tokens_per_second:,.0f} tokens/s ({time.source}); the reference pass, "
    line += "evaluation and saving come on top"
    return [fill(line, _WIDTH, subsequent_indent=" " * 12)]


def _disk(plan: Plan) -> list[str]:
    disk = plan.disk
    kept = "all are kept" if disk.num_checkpoints is None else f"at most {disk.num_checkpoints}"
    parts = [f"a checkpoint {_gib(disk.checkpoint)} GiB ({kept})", f"final/ {_gib(disk.final)} GiB"]
    if disk.reference is not None:
        parts.append(f"reference {_gib(disk.reference)} GiB")
    if disk.total is not None:
        parts.append(f"together {_gib(disk.total)} GiB")
    return [fill(f"disk        {', '.join(parts)}", _WIDTH, subsequent_indent=" " * 12)]


def _verdict(plan: Plan, change: Change | None) -> list[str]:
    there, takes = _gib(plan.place.memory), _gib(plan.peak)
    if plan.fits:
        return [f"fits: {takes} of {there} GiB"]
    lines = [f"does not fit: {takes} of {there} GiB"]
    if change is None:
        return [*lines, "nothing that preftune knows makes it fit on such devices"]
    return [
        *lines,
        "the smallest change that makes it fit (" + change.costs + "):",
        f"  {change.flags}",
    ]


def as_dict(plan: Plan, change: Change | None) -> dict[str, Any]:
    """For machines; sizes in bytes, times in seconds.

    Args:
        plan: what was found.
        change: that makes it fit, if it does not.
    """
    fullest = plan.division.fullest
    phases = {held.name: {**held.parts, "process": plan.process} for held in plan.division.phases}
    return {
        "parameters": asdict(plan.parameters),
        "device": {
            "name": plan.place.name,
            "number": plan.config.num_processes,
            "memory_bytes": plan.place.memory,
            "engine": plan.config.engine,
            "precision": plan.place.precision,
        },
        "heaviest_micro_batch": {
            "rows": len(plan.heaviest.rows),
            "tokens": plan.heaviest.positions,
            "in_step": plan.heaviest.num_in_step,
        },
        "peak_bytes": plan.peak,
        "peak_phase": fullest.name,
        "bytes_by_phase_and_part": phases,
        "host_bytes": plan.division.host,
        "steps": plan.num_steps,
        "time": asdict(plan.duration),
        "disk_bytes": asdict(plan.disk) | {"total": plan.disk.total},
        "rows_are_worst_case": plan.rows.is_worst_case,
        "notes": plan.notes,
        "fits": plan.fits,
        "change": None if change is None else change.options,
    }


def _gib(size: int) -> str:
    gib = size / _GIB
    return f"{gib:.2f}" if gib < 100 else f"{gib:,.0f}"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
