"""DPO, with label smoothing (cDPO) and other divergences (f-DPO)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import MarginLoss, PairLogps, smoothed_logistic
from preftune.losses.knobs import FDivergence
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.DPO].knobs


@dataclass(frozen=True)
class DPO(MarginLoss):
    """Direct preference optimisation.

    z = β·(f'(s_w) − f'(s_l)); value = −(1−ε)·logσ(z) − ε·logσ(−z)

    s = π − ρ is the log-ratio of a completion: π and ρ are the summed log-probs, in nats, of policy
    and reference; w is the chosen, l the rejected completion. f'(s) = s unless `f_divergence` says
    otherwise.

    Args:
        beta: β > 0, per nat: how dear it is to leave the reference.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.
        f_divergence: what f'(s) is, see `f_divergence.py`; s itself with "reverse_kl".
        f_divergence_alpha: in (0, 1), read with "alpha" alone.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w − s_l = (−10 + 12) − (−9 + 8) = 3 and β = 0.1: −logσ(0.3) = log(1 + e^−0.3) =
        0.5544.

    Source: arXiv:2305.18290, equation 7. ε: E. Mitchell, "A note on DPO with noisy preferences
    and relationship to IPO" (cDPO), 2023. f: arXiv:2309.16240.

    Deviates: f' is clamped, see `f_divergence.py`. TRL ignores ε here.

    Settings: β 0.1, learning rate 1e-6 (the paper, appendix B); 7B models: β 0.01 to 0.1, 5e-7.

    Curves: the loss falls from ln 2; both rewards often fall, the rejected one faster.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.DPO

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    f_divergence: FDivergence = _DEFAULTS["f_divergence"]
    f_divergence_alpha: float = _DEFAULTS["f_divergence_alpha"]

    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        return smoothed_logistic(margin, self.label_smoothing)

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
