"""DPO made unbiased under swapped labels (rDPO)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import MarginLoss, PairLogps
from preftune.losses.knobs import FDivergence
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.ROBUST].knobs


@dataclass(frozen=True)
class Robust(MarginLoss):
    """Provably robust DPO.

    z = β·(f'(s_w) − f'(s_l)); value = (−(1−ε)·logσ(z) + ε·logσ(−z)) / (1−2ε)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. If a share ε of the
    labels is swapped, the mean over the noisy pairs is DPO's over the clean ones. Unbounded below
    by nature: for large z it falls like −ε·z/(1−2ε).

    Args:
        beta: β > 0, per nat, as in `DPO`.
        label_smoothing: ε in [0, 0.5): assumed share of swapped labels.
        f_divergence: what f'(s) is, see `f_divergence.py`; s itself with "reverse_kl".
        f_divergence_alpha: in (0, 1), read with "alpha" alone.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, z = 0.3 and ε = 0.1: (0.9·0.5544 − 0.1·0.8544)/0.8 = 0.5169.

    Source: arXiv:2403.00409, section 3, the unbiased form of DPO's loss.

    Deviates: no. With ε = 0, TRL's default, it would be DPO; the default here is the paper's 0.1.

    Settings: β 0.1, ε 0.1 (the paper, section 6 and appendix B); learning rate as for dpo (ours:
    the paper's is 1e-3, appendix B).

    Curves: the loss falls from ln 2 and may pass 0; rewards drift apart without end, so stop early.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.ROBUST

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    f_divergence: FDivergence = _DEFAULTS["f_divergence"]
    f_divergence_alpha: float = _DEFAULTS["f_divergence_alpha"]

    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        # Left out at ε = 0, not multiplied by it: 0·inf would be nan where z overflows (fp16).
        if self.label_smoothing == 0:
            return -logsigmoid(margin)
        eps = self.label_smoothing
        return (-(1 - eps) * logsigmoid(margin) + eps * logsigmoid(-margin)) / (1 - 2 * eps)

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: ln 2, whatever the pairs and ε."""
        return math.log(2)
