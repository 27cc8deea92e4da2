"""Muon: updates of hidden matrices made orthogonal."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.distributed.parts import Part
from preftune.training.optimizers.adamw import adamw_update
from preftune.training.optimizers.masked import Group, MaskedOptimizer, State

_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_SIZE = 0.2
"""Root mean square of an update, in learning rates: about AdamW's."""


class Muon(MaskedOptimizer):
    """Muon for hidden matrices, AdamW for embeddings, head, norms and biases.

    Groups that have a `momentum` are Muon's. Its update is scaled so that one learning rate and one
    weight decay suit both: PyTorch's `adjust_lr_fn="match_rms_adamw"`, whose steps it takes.

    Source: K. Jordan et al., Muon (2024); the scale: 2502.16982, section 2.2.
    """

    def by_rows(self, group: Group) -> bool:
        """A matrix is made orthogonal as a whole."""
        return "momentum" not in group

    def new_state(self, part: Part, group: Group) -> dict[str, Tensor]:
        """Momentum of zero, or AdamW's moments."""
        names = ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(part.tensor, dtype=torch.float32) for name in names}

    def updated(
        self, weight: Tensor, grad: Tensor, state: State, step: Tensor, group: Group
    ) -> tuple[Tensor, State]:
        """Muon's step with Nesterov momentum, or AdamW's."""
        if "momentum" not in group:
            return adamw_update(weight, grad, state, step, group)
        momentum, rate = group["momentum"], group["lr"]
        buffer = state["momentum_buffer"].lerp(grad, 1 - momentum)
        change = orthogonal(grad.lerp(buffer, momentum)).float()
        size = rate * _SIZE * max(weight.shape[-2:]) ** 0.5
        weight = weight * (1 - rate * group["weight_decay"]) - change * size
        return weight, {"momentum_buffer": buffer}


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each U S V^T, by Newton-Schulz rounds in bfloat16.

    Args:
        matrices: [..., rows, columns]; experts of a layer are matrices, too.
    """
    x = matrices.bfloat16().reshape(-1, *matrices.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=_B, alpha=_C)
        x = torch.baddbmm(x, square, x, beta=_A)
    return (x.mT if is_tall else x).reshape(matrices.shape)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """What Muon is for: matrices, and stacks of them, that are neither embeddings nor the head.

    Args:
        model: a causal LM, or what holds one.
    """
    outside = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            outside.add(module.weight)
        if isinstance(module, PreTrainedModel):
            head = module.get_output_embeddings()
            outside |= set() if head is None else set(head.parameters())
    return {
        p for p in model.parameters() if p.ndim > 1 and min(p.shape[-2:]) > 1 and p not in outside
    }
