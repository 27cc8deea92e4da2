"""What f-DPO puts in the place of the log-ratio.

Source: arXiv:2309.16240, the objective of f-DPO: the implicit reward of a completion is β·f'(u),
u = π/ρ, up to a constant of the prompt.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune.losses.knobs import FDivergence

# exp of more overflows fp16; bf16 and fp32 hold e^80 = 5.5e34 and some thousand times that.
_LARGEST_EXPONENT = 80.0
_LARGEST_EXPONENT_FP16 = 11.0


def divergence_score(
    logratio: Float[Tensor, " pairs"], divergence: FDivergence, alpha: float
) -> Float[Tensor, " pairs"]:
    """f'(u), shifted to be 0 where policy equals reference; x is log u.

    - `reverse_kl`: x
    - `forward_kl`: 1 − e^−x
    - `js`: log 2 + logσ(x), at most log 2
    - `alpha`: (1 − e^−αx)/α, between the first (α → 0) and the second (α → 1)

    Clamped: exponents above 80 (fp16: 11) count as 80. There, a completion e^80 times less likely
    than under the reference, the slope is 0.

    Args:
        logratio: x = log π − log ρ, summed over a completion, nats.
        divergence: which.
        alpha: α in (0, 1), read by `alpha` alone. TRL's coefficient is 1 − α.
    """
    if divergence == "reverse_kl":
        return logratio
    if divergence == "js":
        return math.log(2) + logsigmoid(logratio)
    order = alpha if divergence == "alpha" else 1.0
    largest = _LARGEST_EXPONENT_FP16 if logratio.dtype == torch.float16 else _LARGEST_EXPONENT
    return -torch.expm1((-order * logratio).clamp(max=largest)) / order
