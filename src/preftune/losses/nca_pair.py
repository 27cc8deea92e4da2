"""NCA on pairs."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import PairLogps, RewardLoss
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.NCA_PAIR].knobs


@dataclass(frozen=True)
class NCAPair(RewardLoss):
    """Noise contrastive alignment, two completions.

    value = −logσ(βs_w) − ½·logσ(−βs_w) − ½·logσ(−βs_l)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`.

    Args:
        beta: β > 0, per nat.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w = 20, s_l = −10 and β = 0.01: 0.5981 + ½·0.7981 + ½·0.6444 = 1.3194.

    Source: arXiv:2402.05369, the preference form of its NCA objective (two completions, rewards 1
    and 0).

    Deviates: no.

    Settings: β 0.01 in the authors' code, 0.1 here, for bco_pair's reason; learning rate 5e-6 (the
    authors' code, QLoRA).

    Curves: the loss falls slowly from 2·ln 2; the chosen reward rises towards ln 2, its optimum,
    and does not fall as with dpo.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.NCA_PAIR

    beta: float = _DEFAULTS["beta"]

    def _of_rewards(
        self, chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 2·ln 2, whatever the pairs."""
        return 2 * math.log(2)
