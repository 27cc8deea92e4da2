"""BCO on pairs."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import PairLogps, RewardLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.BCO_PAIR].knobs


@dataclass(frozen=True)
class BCOPair(RewardLoss):
    """Binary classifier optimisation, both completions of a pair.

    value = −logσ(βs_w) − logσ(−βs_l)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`.

    Args:
        beta: β > 0, per nat.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = 20, s_l = −10 and β = 0.01: 0.5981 + 0.6444 = 1.2425.

    Source: arXiv:2404.04656, theorem 1, the bound on DPO's loss.

    Deviates: without the paper's shift of the reward by a running mean, as in TRL; on pairs both
    sides come in equal numbers.

    Settings: β 0.01 in the paper, 0.1 here: at 0.01 the sigmoids are straight over the margins of a
    short run, which learns less from it (docs/learning.md); learning rate 5e-7 (the paper).

    Curves: the loss falls from 2·ln 2; the chosen reward rises above 0, the rejected one falls
    below.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.BCO_PAIR

    beta: float = _DEFAULTS["beta"]

    def _of_rewards(
        self, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        return -logsigmoid(chosen) - logsigmoid(-rejected)

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 2·ln 2, whatever the pairs."""
        return 2 * math.log(2)
