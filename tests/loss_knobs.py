"""Which losses there are, and legal values of their knobs; no torch."""

import math

from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType

ON_PAIRS = [loss for loss in DPOLossType if not LOSS_SPECS[loss].unpaired]
UNPAIRED = [loss for loss in DPOLossType if LOSS_SPECS[loss].unpaired]


def other_value(loss_type: DPOLossType, name: str) -> float | str:
    """A legal value of a knob besides the loss's default."""
    knob, default = LOSS_SPECS[loss_type].knob(name), LOSS_SPECS[loss_type].knobs[name]
    if knob.choices:
        return next(word for word in knob.choices if word != default)
    low = max(knob.numbers.low, 0.0)
    high = knob.numbers.high if math.isfinite(knob.numbers.high) else low + 1.5
    return low + (high - low) / (2 if default != low + (high - low) / 2 else 3)


def knobs_given(loss_type: DPOLossType) -> dict[str, float | str]:
    """Another value for every knob that a loss can read at once."""
    needed = {
        other.name: other.value
        for name in LOSS_SPECS[loss_type].knobs
        if (other := KNOBS[name].only_with)
    }
    return {name: other_value(loss_type, name) for name in LOSS_SPECS[loss_type].knobs} | needed
