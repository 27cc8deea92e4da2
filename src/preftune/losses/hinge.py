"""The hinge loss on DPO's margin."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from preftune.losses.base import MarginLoss, PairLogps
from preftune.losses.knobs import FDivergence
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.HINGE].knobs


@dataclass(frozen=True)
class Hinge(MarginLoss):
    """Hinge loss (SLiC, RSO's hinge-norm).

    z = β·(f'(s_w) − f'(s_l)); value = max(0, 1 − z)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. A pair whose margin
    reaches 1/β gives no gradient any more.

    Args:
        beta: β > 0, per nat: γ in RSO, 1/δ in SLiC.
        f_divergence: what f'(s) is, see `f_divergence.py`; s itself with "reverse_kl".
        f_divergence_alpha: in (0, 1), read with "alpha" alone.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, s_w − s_l = 3 and β = 0.05: 1 − 0.15 = 0.85.

    Source: arXiv:2309.06657, loss "hinge-norm"; without a reference, SLiC-HF, arXiv:2305.10425.

    Deviates: SLiC-HF's regularisation term is `sft_weight`; its reference-free form is not offered.

    Settings: β 0.05 (RSO's γ); learning rate as for dpo (ours: SLiC's 1e-4, section 3.2, is for
    T5).

    Curves: the loss falls from 1 to near 0 and the gradient norm with it, as pairs pass the margin.
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.HINGE

    beta: float = _DEFAULTS["beta"]
    f_divergence: FDivergence = _DEFAULTS["f_divergence"]
    f_divergence_alpha: float = _DEFAULTS["f_divergence_alpha"]

    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        return (1 - margin).relu()

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: 1, whatever the pairs."""
        return 1.0
