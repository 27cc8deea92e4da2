"""From a loss's name and knobs to the loss."""

from difflib import get_close_matches
from typing import Any, TypeAlias, assert_never

from preftune.losses.dpo import DPO
from preftune.losses.dpo_norm import DPONorm
from preftune.losses.simpo import SimPO
from preftune.losses.spec import LOSS_SPECS, DPOLossType
from preftune.losses.wpo import WPO

Loss: TypeAlias = DPO | DPONorm | SimPO | WPO
"""Every loss on pairs: a closed union."""


def make_loss(loss_type: DPOLossType, **knobs: Any) -> Loss:
    """Make a loss; a knob not given takes that loss's default.

    Args:
        loss_type: which loss.
        **knobs: any of `LOSS_SPECS[loss_type].knobs`.

    Raises:
        ValueError: if a knob is unknown, belongs to another loss only, or is out of range.
    """
    for name in knobs:
        if name not in LOSS_SPECS[loss_type].knobs:
            raise ValueError(_foreign_knob(loss_type, name))
    match loss_type:
        case DPOLossType.DPO:
            return DPO(**knobs)
        case DPOLossType.DPO_NORM:
            return DPONorm(**knobs)
        case DPOLossType.SIMPO:
            return SimPO(**knobs)
        case DPOLossType.WPO:
            return WPO(**knobs)
        case _:
            assert_never(loss_type)


def _foreign_knob(loss_type: DPOLossType, name: str) -> str:
    own = list(LOSS_SPECS[loss_type].knobs)
    owners = [other for other, spec in LOSS_SPECS.items() if name in spec.knobs]
    if owners:
        return (
            f"{name} is a knob of {', '.join(owners)}; {loss_type} would ignore it: "
            f"leave it out (knobs of {loss_type}: {', '.join(own)})"
        )
    near = get_close_matches(name, own, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{name} is no knob of a loss; {hint}(knobs of {loss_type}: {', '.join(own)})"
