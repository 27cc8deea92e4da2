"""AdamW whose moments are kept in fp32, in 8 or in 4 bits."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from preftune.distributed.parts import Part
from preftune.training.optimizers.blocks import Codes, block_size
from preftune.training.optimizers.masked import Group, MaskedOptimizer, State
from preftune.training.optimizers.rounding import StochasticRounding


class BlockwiseAdamW(MaskedOptimizer):
    """AdamW with moments of fewer bits, as torchao's AdamW8bit and AdamW4bit.

    Deviates: torchao's blocks run over the ends of rows and are 256 (8 bits) or 128 numbers long;
    here a row that those do not divide has shorter ones. With rows that they divide, both take the
    same steps.

    Source: 2110.02861 (8 bits), 2309.01507 (4 bits).
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        learning_rate: float,
        *,
        bits: Literal[4, 8, 32],
        rounding: StochasticRounding | None = None,
    ) -> None:
        """Nothing is held yet.

        Args:
            groups: of parameters, with `betas`, `eps` and `weight_decay`.
            learning_rate: of the first step.
            bits: of a moment.
            rounding: see `MaskedOptimizer`.
        """
        super().__init__(groups, learning_rate, rounding)
        self._codes: dict[str, Codes] = {}
        if bits != 32:
            self._codes = {"exp_avg": Codes(bits, True), "exp_avg_sq": Codes(bits, False)}

    def new_state(self, part: Part, group: Group) -> dict[str, Tensor]:
        """Moments of zero."""
        state = {}
        for name in ("exp_avg", "exp_avg_sq"):
            codes = self._codes.get(name)
            block = codes and block_size(part, codes.bits)
            if codes is None or block is None:
                state[name] = torch.zeros_like(part.tensor, dtype=torch.float32)
            else:
                state[f"{name}.codes"], state[f"{name}.scales"] = codes.zeros(part, block)
        return state

    def updated(
        self, weight: Tensor, grad: Tensor, state: State, step: Tensor, group: Group
    ) -> tuple[Tensor, State]:
        """See `adamw_update`; moments are unpacked for it, and packed again."""
        if "exp_avg" in state:
            return adamw_update(weight, grad, state, step, group)
        moments = {
            name: codes.decoded(state[f"{name}.codes"], state[f"{name}.scales"]).view_as(weight)
            for name, codes in self._codes.items()
        }
        weight, moments = adamw_update(weight, grad, moments, step, group)
        packed = {}
        for name, codes in self._codes.items():
            block = grad[:1].numel() // state[f"{name}.scales"].shape[1]
            packed[f"{name}.codes"], packed[f"{name}.scales"] = codes.encoded(moments[name], block)
        return weight, packed


def adamw_update(
    weight: Tensor, grad: Tensor, state: State, step: Tensor, group: Group
) -> tuple[Tensor, dict[str, Tensor]]:
    """AdamW's step.

    Args:
        weight: fp32, any shape.
        grad: as the weight.
        state: `exp_avg` and `exp_avg_sq`, as the weight.
        step: device scalar, counted from 1.
        group: `lr`, `betas`, `eps` and `weight_decay`.

    Source: 1711.05101, algorithm 2.
    """
    (beta1, beta2), rate = group["betas"], group["lr"]
    mean = state["exp_avg"].lerp(grad, 1 - beta1)
    square = state["exp_avg_sq"].lerp(grad.square(), 1 - beta2)
    root = square.sqrt().div_((1 - beta2**step).sqrt()).add_(group["eps"])
    change = (mean / root).mul_(rate / (1 - beta1**step))
    weight = (weight * (1 - rate * group["weight_decay"])).sub_(change)
    return weight, {"exp_avg": mean, "exp_avg_sq": square}
