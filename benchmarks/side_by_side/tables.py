"""Markdown of a record."""

from collections.abc import Sequence
from typing import Any

from .arms import Arm
from .summary import counts_per_pair, summarise

TRL_HEAD = (
    "TRL's head skips the positions of prompts and padding only on GPUs; on a CPU it computes "
    "their logits, too. `trl_patched` is `trl_tuned` with that switched on by a patch at run time."
)
PREDICTION = (
    "*Predicted* is the ratio of the matrix products that both sides compute (backbone, head, "
    "attention; with their own padding, checkpointing and recomputed logits). *Of the limit* is "
    "the arithmetic that the loss needs (each prompt once, no padding, logits once) over the "
    "machine's fp32 or bf16 matrix products in the same time, measured between the arms. *Peak* is "
    "of the whole process (GPU: of what it allocated), from start to last step."
)


def as_markdown(record: dict[str, Any], arms: Sequence[Arm]) -> str:
    """The whole record as text for `docs/performance.md`."""
    machine = record["machine"]
    clock = "cpu" if machine["device"] == "cpu" else "wall"
    parts = [_heading(record), *_notes(machine)]
    for setting in record["settings"]:
        parts += ["", f"### {setting['label']}", ""]
        parts += _setting(setting, arms, clock, machine, record["options"]["epochs"])
    return "\n".join(parts) + "\n"


def _heading(record: dict[str, Any]) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    device = machine.get("gpu") or (
        f"{machine['cpu']} ({', '.join(machine['cpu_flags'])}), {machine['cores']} cores, "
        f"{record['options']['threads']} threads"
    )
    return f"{record['date']}; {device}, {machine['memory_gib']:.0f} GiB; {versions}."


def _notes(machine: dict[str, Any]) -> list[str]:
    if machine["device"] != "cpu":
        return ["", "Times are of the wall; products are bf16 under autocast. " + PREDICTION]
    return ["", "Ratios are of process CPU time. " + PREDICTION, "", TRL_HEAD]


def _setting(
    setting: dict[str, Any], arms: Sequence[Arm], clock: str, machine: dict[str, Any], epochs: float
) -> list[str]:
    rows = summarise(setting, arms, clock)
    lines = [_gate_line(setting)] if "gate" in setting else []
    lines += ["", *_counts(setting, arms), "", *_speed(rows, clock, arms, machine)]
    lines += ["", *_with_reference(rows, clock, epochs)]
    return lines


def _gate_line(setting: dict[str, Any]) -> str:
    gate = setting["gate"]
    off = gate["largest"]
    return (
        f"Equality, from a policy that is not the reference, over {gate['steps']} steps: largest "
        f"relative difference of losses {off['losses']:.1e}, of gradient norms before clipping "
        f"{off['grad_norms']:.1e}, of the pairs' log-probs "
        f"{max(v for k, v in off.items() if k.startswith(('policy', 'reference'))):.1e} "
        f"({off['nats_at_step_1']:.1e} nats at step 1)."
    )


def _counts(setting: dict[str, Any], arms: Sequence[Arm]) -> list[str]:
    lines = [
        "| tokens a pair | padded (TRL) | unpadded | shared prompts (preftune) | scored |",
        "|---|---|---|---|---|",
    ]
    for name, counts in counts_per_pair(setting, arms).items():
        lines.append(
            f"| {name} order | {counts['padded']:.0f} | {counts['unpadded']:.0f} | "
            f"{counts['shared']:.0f} | {counts['scored']:.0f} |"
        )
    return lines


def _speed(
    rows: list[dict[str, Any]], clock: str, arms: Sequence[Arm], machine: dict[str, Any]
) -> list[str]:
    notes = {arm.name: arm.note for arm in arms}
    mfu = " MFU |" if machine.get("peak_bf16") else ""
    lines = [
        f"| arm | pairs/s ({clock}: median, best) | pairs/s (wall) | time × | predicted | "
        f"measured/predicted | peak GiB | memory × | first step s | of the limit |{mfu}",
        "|---|---|---|---|---|---|---|---|---|---|" + ("---|" if mfu else ""),
    ]
    for row in rows:
        if "error" in row:
            first = row["error"].splitlines()[-1].strip()
            lines.append(f"| `{row['arm']}`: {notes[row['arm']]} | {first} |" + " |" * 8)
            continue
        times = row["seconds_per_pair"]
        line = (
            f"| `{row['arm']}`: {notes[row['arm']]} | {1 / times[clock]['median']:.3f}, "
            f"{1 / times[clock]['minimum']:.3f} | {1 / times['wall']['median']:.3f} | "
            f"{_number(row, 'time_ratio')} | {_number(row, 'predicted_ratio')} | "
            f"{_number(row, 'measured_over_predicted')} | {row['peak_gib']:.2f} | "
            f"{_number(row, 'memory_ratio')} | {row['first_step_seconds']:.1f} | "
            f"{row['share_of_products']:.0%} |"
        )
        if mfu:
            rate = row["needed_flops_per_pair"] / times["wall"]["median"]
            line += f" {rate / machine['peak_bf16']:.1%} |"
        lines.append(line)
    return lines


def _number(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.2f}" if key in row else ""


def _with_reference(rows: list[dict[str, Any]], clock: str, epochs: float) -> list[str]:
    lines = [
        f"| reference counted | pass, s a pair ({clock}) | "
        f"pairs/s over 1 epoch, as without a cache | pairs/s over {epochs:g} epochs |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            continue
        step = row["seconds_per_pair"][clock]["median"]
        once = row["reference_seconds_per_pair"]
        shown = "in the step" if once is None else f"{once:.3f}"
        once = once or 0.0
        lines.append(
            f"| `{row['arm']}` | {shown} | {1 / (step + once):.3f} | "
            f"{1 / (step + once / epochs):.3f} |"
        )
    return lines


def growth_markdown(record: dict[str, Any], arms: Sequence[Arm]) -> str:
    """Time and memory of a step against lengths, batch size and vocabulary."""
    clock = "cpu" if record["machine"]["device"] == "cpu" else "wall"
    names = [arm.name for arm in arms]
    lines = [
        _heading(record),
        "",
        f"| setting | {' | '.join(f'{n} {clock} s/step | {n} GiB' for n in names)} |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    for setting in record["settings"]:
        cells = []
        for row in summarise(setting, arms, clock):
            if "error" in row:
                cells.append(f"{row['error'].splitlines()[-1].strip()} | ")
                continue
            step = row["seconds_per_pair"][clock]["median"] * setting["batch_size"]
            cells.append(f"{step:.2f} | {row['peak_gib']:.2f}")
        lines.append(f"| {setting['label']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
