"""EXO on pairs: the reverse KL where DPO takes the forward one."""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.base import MarginLoss, PairLogps
from preftune.losses.knobs import FDivergence
from preftune.losses.spec import LOSS_SPECS, DPOLossType

_DEFAULTS = LOSS_SPECS[DPOLossType.EXO_PAIR].knobs


@dataclass(frozen=True)
class EXOPair(MarginLoss):
    """Efficient exact optimisation, two completions (EXO-pref).

    z = β·(f'(s_w) − f'(s_l)); value = σ(z)·(logσ(z) − log(1−ε)) + σ(−z)·(logσ(−z) − log ε)

    s = π − ρ is the log-ratio of a completion, sums in nats, as in `DPO`. It is the KL divergence
    of (σ(z), σ(−z)), the preference that the policy implies, from the label (1−ε, ε): least, 0,
    at z = log((1−ε)/ε).

    Args:
        beta: β > 0, per nat: the paper's β_π.
        label_smoothing: ε in (0, 0.5): probability that the label gives the rejected completion.
        f_divergence: what f'(s) is, see `f_divergence.py`; s itself with "reverse_kl".
        f_divergence_alpha: in (0, 1), read with "alpha" alone.

    Raises:
        ValueError: if a knob is out of range.

    Example:
        One pair, z = 0 and ε = 0.001: ½·(log ½ − log 0.999) + ½·(log ½ − log 0.001) = 2.7612.

    Source: arXiv:2402.00856, equation 16 with K = 2; ε as the paper recommends.

    Deviates: no. The authors' code takes log ε = −10 and log(1−ε) = 0.

    Settings: β 0.5, learning rate 1e-6 (the authors' code, hh); ε 1e-3 (the paper).

    Curves: pairs that the policy orders very wrongly give almost no gradient: σ(z)·σ(−z) leads it.
    The loss falls from 2.76 (ε = 0.001).
    """

    loss_type: ClassVar[DPOLossType] = DPOLossType.EXO_PAIR

    beta: float = _DEFAULTS["beta"]
    label_smoothing: float = _DEFAULTS["label_smoothing"]
    f_divergence: FDivergence = _DEFAULTS["f_divergence"]
    f_divergence_alpha: float = _DEFAULTS["f_divergence_alpha"]

    def _of_margin(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        log_right, log_wrong = logsigmoid(margin), logsigmoid(-margin)
        eps = self.label_smoothing
        return log_right.exp() * (log_right - math.log1p(-eps)) + log_wrong.exp() * (
            log_wrong - math.log(eps)
        )

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """Mean over pairs where policy equals reference: −ln 2 − ½·ln(ε(1−ε))."""
        eps = self.label_smoothing
        return -math.log(2) - 0.5 * (math.log(eps) + math.log1p(-eps))
