"""DiscoPOP: the blend of two losses that a language model found."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import MarginLoss, PairLogps
from preftune.losses.knobs import FDivergence
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.DISCOPOP].knobs


@dataclass(frozen=True)
class DiscoPOP(MarginLoss):
    """Log-ratio modulated loss (LRML).

    z = β·(f'(s_w) − f'(s_l)), m = σ(z/τ); value = −(1−m)·logσ(z) + m·e^−z

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. Not convex: near z = 0 it
    rises with z: for τ = 0.05 from 0.85 to 0.88.

    Args:
        beta: β > 0, per nat, as in `DPO`.
        discopop_tau: τ in (0, 1]: how sharply m goes from 0 to 1.
        f_divergence: what f'(s) is, see `f_divergence.py`; s itself with "reverse_kl".
        f_divergence_alpha: in (0, 1), read with "alpha" alone.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, z = 0.05 and τ = 0.05: m = σ(1) = 0.7311, 0.2689·0.6685 + 0.7311·0.9512 = 0.8752.

    Source: arXiv:2406.08414, equation 5.

    Deviates: m·e^−z is computed as e^(logσ(z/τ) − z), which is 0 where the formula as written gives
    0·∞. τ above 1, where the loss would grow exponentially, is refused.

    Settings: β 0.05, learning rate 5e-7, τ 0.05 (the paper, appendices B.1 and E).

    Curves: the loss starts at 0.85, between ln 2 and 1, and may rise at first as the margin grows.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.DISCOPOP

    beta: float = _DEFAULTS["beta"]
    discopop_tau: float = _DEFAULTS["discopop_tau"]
    f_divergence: FDivergence = _DEFAULTS["f_divergence"]
    f_divergence_alpha: float = _DEFAULTS["f_divergence_alpha"]

    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        share = margin / self.discopop_tau
        logistic = -logsigmoid(-share).exp() * logsigmoid(margin)
        return logistic + (logsigmoid(share) - margin).exp()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ½·(1 + ln 2), whatever the pairs."""
        return 0.5 * (1 + math.log(2))
