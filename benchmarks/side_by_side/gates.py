"""Whether both tools compute the same numbers. Pure.

Policy and reference differ from the start: where they are equal every loss is ln 2, whatever is
scored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

PER_PAIR = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")

FIRST_STEP = {"logps": (1e-3, 1e-6), "grad_norms": (0.0, 1e-4), "losses": (1e-5, 1e-5)}
"""Absolute and relative tolerance at the first step, whose weights are the same bits: rounding of
fp32, in which TRL sums log-probs."""
LATER_STEPS = {"logps": (0.0, 1e-3), "grad_norms": (0.0, 1e-3), "losses": (0.0, 1e-3)}
"""AdamW turns rounding of small gradients into updates of full size."""


class Difference(NamedTuple):
    """Two numbers that should be one."""

    what: str
    step: int
    preftune: float
    trl: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.what} of step {self.step}: preftune {self.preftune:.9g}, TRL {self.trl:.9g}"


def differences(preftune: dict[str, Any], trl: dict[str, Any]) -> list[Difference]:
    """Where two records of the same steps disagree by more than rounding.

    Args:
        preftune: `losses` and `grad_norms`, a number a step, and `PER_PAIR`, a list of pairs' sums
            a step.
        trl: the same.
    """
    found = []
    for name in (*PER_PAIR, "grad_norms", "losses"):
        ours, theirs = preftune[name], trl[name]
        if len(ours) != len(theirs):
            raise ValueError(f"{name}: {len(ours)} steps of preftune, {len(theirs)} of TRL")
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
            tolerances = FIRST_STEP if step == 1 else LATER_STEPS
            absolute, relative = tolerances["logps" if name in PER_PAIR else name]
            for x, y in zip(_as_list(a), _as_list(b), strict=True):
                if not abs(x - y) <= absolute + relative * abs(y):
                    found.append(Difference(name, step, x, y))
    return found


def largest(preftune: dict[str, Any], trl: dict[str, Any]) -> dict[str, float]:
    """Largest relative difference by quantity, over all steps; log-probs also in nats at step 1."""
    result = {}
    for name in (*PER_PAIR, "grad_norms", "losses"):
        flat = [
            (x, y)
            for a, b in zip(preftune[name], trl[name], strict=True)
            for x, y in zip(_as_list(a), _as_list(b), strict=True)
        ]
        result[name] = max(abs(x - y) / max(abs(y), 1e-12) for x, y in flat)
    result["nats_at_step_1"] = max(
        abs(x - y)
        for name in PER_PAIR
        for x, y in zip(preftune[name][0], trl[name][0], strict=True)
    )
    return result


def loss_differences(runs: dict[str, Sequence[float]], tolerance: float = 1e-3) -> list[str]:
    """Steps at which timed arms on the same pairs disagree in their loss; relative tolerance."""
    names = sorted(runs)
    found = []
    for name in names[1:]:
        for step, (a, b) in enumerate(zip(runs[names[0]], runs[name], strict=True), start=1):
            if not abs(a - b) <= tolerance * abs(b):
                found.append(f"loss of step {step}: {names[0]} {a:.9g}, {name} {b:.9g}")
    return found


def _as_list(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
