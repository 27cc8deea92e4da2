"""Losses on pairs: pure functions of log-probs, one value a pair, usable without the rest.

Each loss is the class that `LOSS_SPECS` names, in the module of its `loss_type`; all of them can be
imported from here. What needs torch is loaded on first use, so that config and `--help` can read
the table.

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

from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType

if TYPE_CHECKING:
    from preftune.losses.base import Loss, PairLogps, PairLoss
    from preftune.losses.combined import Combined, combine
    from preftune.losses.make import make_loss
    from preftune.losses.supervised import AnswerLogps, NegativeLogLikelihood
    from preftune.losses.unpaired import CompletionLogps, CompletionLoss, UnpairedLoss

__all__ = [
    "KNOBS",
    "LOSS_SPECS",
    "AnswerLogps",
    "Combined",
    "CompletionLogps",
    "CompletionLoss",
    "DPOLossType",
    "Loss",
    "NegativeLogLikelihood",
    "PairLogps",
    "PairLoss",
    "UnpairedLoss",
    "combine",
    "make_loss",
]

_HOMES = {spec.class_name: loss.value for loss, spec in LOSS_SPECS.items()} | {
    "Loss": "base",
    "PairLogps": "base",
    "PairLoss": "base",
    "CompletionLogps": "unpaired",
    "CompletionLoss": "unpaired",
    "UnpairedLoss": "unpaired",
    "AnswerLogps": "supervised",
    "NegativeLogLikelihood": "supervised",
    "Combined": "combined",
    "combine": "combined",
    "make_loss": "make",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"preftune.losses.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'preftune.losses' has no attribute {name!r}")
