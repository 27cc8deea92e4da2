"""Losses on pairs: pure functions of log-probs, one value a pair, usable without the rest.

Names that need torch are loaded on first use, so that config and `--help` can read `spec`.

Example:
    >>> import torch
    >>> from preftune.losses import DPOLossType, PairLogps, make_loss
    >>> loss = make_loss(DPOLossType.DPO, beta=0.1)
    >>> lengths = torch.tensor([4])
    >>> policy, reference = torch.tensor([-10.0]), torch.tensor([-12.0])
    >>> loss(PairLogps(policy, policy, lengths, lengths, reference, reference)).values
    tensor([0.6931])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from preftune.losses.spec import LOSS_SPECS, DPOLossType

if TYPE_CHECKING:
    from preftune.losses.base import PairLogps, PairLoss
    from preftune.losses.dpo import DPO
    from preftune.losses.dpo_norm import DPONorm
    from preftune.losses.make import Loss, make_loss
    from preftune.losses.simpo import SimPO
    from preftune.losses.wpo import WPO

__all__ = [
    "DPO",
    "LOSS_SPECS",
    "WPO",
    "DPOLossType",
    "DPONorm",
    "Loss",
    "PairLogps",
    "PairLoss",
    "SimPO",
    "make_loss",
]

_HOMES = {
    "PairLogps": "preftune.losses.base",
    "PairLoss": "preftune.losses.base",
    "DPO": "preftune.losses.dpo",
    "DPONorm": "preftune.losses.dpo_norm",
    "SimPO": "preftune.losses.simpo",
    "WPO": "preftune.losses.wpo",
    "Loss": "preftune.losses.make",
    "make_loss": "preftune.losses.make",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'preftune.losses' has no attribute {name!r}")
