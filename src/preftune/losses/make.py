"""From a loss's name and knobs to the loss."""

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from preftune.losses.base import Loss
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType
from preftune.losses.unpaired import UnpairedLoss


def make_loss(loss_type: DPOLossType, **knobs: Any) -> Loss | UnpairedLoss:
    """Make a loss; a knob not given takes that loss's default.

    Args:
        loss_type: which loss.
        **knobs: any of `LOSS_SPECS[loss_type].applying(knobs)`.

    Raises:
        ValueError: if a knob is unknown, would be ignored, or is out of range.
    """
    spec = LOSS_SPECS[loss_type]
    applying = spec.applying(knobs)
    for name in knobs:
        if name not in applying:
            raise ValueError(_foreign_knob(loss_type, name, list(applying)))
    module = import_module(f"preftune.losses.{loss_type.value}")
    return getattr(module, spec.class_name)(**knobs)


def _foreign_knob(loss_type: DPOLossType, name: str, own: list[str]) -> str:
    listed = f"(knobs of {loss_type}: {', '.join(own)})"
    if name in KNOBS:
        refusal = LOSS_SPECS[loss_type].refusal(name)
        return f"{name} is given, and the loss {loss_type} {refusal}; leave it out {listed}"
    near = get_close_matches(name, own, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name} is no knob of a loss; {hint}{listed}"
