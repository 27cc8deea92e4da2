"""Adafactor: squares of gradients by rows and columns, no momentum."""

import torch
from torch import Tensor

from preftune.distributed.parts import Part
from preftune.training.optimizers.masked import Group, MaskedOptimizer, State

_DECAY, _EPSILON, _LONGEST = 0.8, 1e-30, 1.0


class Adafactor(MaskedOptimizer):
    """Adafactor with the learning rate as given, as the field runs it.

    That is transformers' with `scale_parameter` and `relative_step` off, which its Trainer, and so
    TRL and axolotl, choose. PyTorch's own multiplies the rate by the size of the weights (a
    fiftieth or so) and waits for the device twice for each of them.

    Source: 1804.04235, algorithms 4 and 6, without relative step sizes.
    """

    def by_rows(self, group: Group) -> bool:
        """The columns' state is that of all rows."""
        return False

    def new_state(self, part: Part, group: Group) -> dict[str, Tensor]:
        """Of matrices a number for each row and column; of vectors, one for each number."""
        new, shape = part.tensor.new_zeros, part.tensor.shape
        if len(shape) < 2:
            return {"exp_avg_sq": new(shape, dtype=torch.float32)}
        return {
            "exp_avg_sq_row": new(shape[:-1], dtype=torch.float32),
            "exp_avg_sq_col": new(shape[:-2] + shape[-1:], dtype=torch.float32),
        }

    def updated(
        self, weight: Tensor, grad: Tensor, state: State, step: Tensor, group: Group
    ) -> tuple[Tensor, State]:
        """The step of the paper."""
        share = step**-_DECAY  # of this gradient in what is kept
        square = grad.square() + _EPSILON
        if "exp_avg_sq" in state:
            kept = state["exp_avg_sq"].lerp(square, share)
            new, change = {"exp_avg_sq": kept}, kept.rsqrt().mul_(grad)
        else:
            rows = state["exp_avg_sq_row"].lerp(square.mean(-1), share)
            columns = state["exp_avg_sq_col"].lerp(square.mean(-2), share)
            new = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
            factors = (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None]
            change = (factors * columns.rsqrt()[..., None, :]).mul_(grad)
        size = change.norm() / change.numel() ** 0.5
        change = change.mul_(group["lr"] / (size / _LONGEST).clamp(min=1.0))
        return weight * (1 - group["lr"] * group["weight_decay"]) - change, new
