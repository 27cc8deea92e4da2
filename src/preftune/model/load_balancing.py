"""How evenly a mixture of experts spreads its tokens over them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from preftune.errors import ModelError


class Routing(NamedTuple):
    """What the routers of all layers did with the tokens of a micro-batch."""

    taken: Float[Tensor, " experts"]
    """How often each expert was taken: top-k times a token and layer."""
    probabilities: Float[Tensor, " experts"]
    """Sum over tokens and layers of the router's probability; with gradient."""
    num_tokens: Float[Tensor, ""]
    """Tokens, counted once a layer."""

    def plus(self, other: "Routing") -> "Routing":
        """Of the tokens of both."""
        return Routing(
            self.taken + other.taken,
            self.probabilities + other.probabilities,
            self.num_tokens + other.num_tokens,
        )

    def summed(self, total: Callable[[Tensor], Tensor]) -> "Routing":
        """Of the tokens of several processes.

        Args:
            total: sums a tensor over them.
        """
        experts = len(self.taken)
        numbers = total(torch.cat((self.probabilities, self.taken, self.num_tokens[None])))
        taken = numbers[experts:-1].detach()
        return Routing(taken, numbers[:experts], numbers[-1].detach())

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The load-balancing loss: experts × Σ_i f_i·P_i.

        f_i is how often expert i was taken and P_i its mean probability, a token and layer. It is
        top-k where all experts are taken alike, and more where some are preferred. The gradient
        goes through P alone.

        Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, equations 4 to 6, for the
        top-k experts and over all layers together, as transformers computes it.
        """
        often = self.taken / self.num_tokens
        return len(often) * (often * (self.probabilities / self.num_tokens)).sum()


def routing_of(
    router_logits: Sequence[Tensor], top_k: int, real: Bool[Tensor, " tokens"]
) -> Routing:
    """Add up what routers did with the real tokens of a forward.

    Args:
        router_logits: (tokens, experts) or (rows, width, experts) a layer, padding included.
        top_k: experts that a token takes.
        real: which tokens are no padding.

    Raises:
        ModelError: the model's layers have no such router.
    """
    router_logits = [logits.flatten(0, -2) for logits in router_logits]
    shapes = {tuple(logits.shape) for logits in router_logits}
    if len(shapes) != 1 or any(shape[:-1] != real.shape for shape in shapes):
        raise ModelError(
            f"load_balancing_weight is set, and the routers of the model gave logits of shapes "
            f"{sorted(shapes)} for {len(real)} tokens, where every layer should give tokens × "
            "experts; leave it out"
        )
    counts = real.double()
    taken = probabilities = counts.new_zeros(router_logits[0].shape[-1])
    for logits in router_logits:
        # In fp32 at least, whatever the router computes in.
        layer = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        experts = layer.topk(top_k, dim=-1).indices
        # Whole numbers: exact in any order, so that atomic additions on a GPU change nothing.
        taken = taken.scatter_add(0, experts.flatten(), counts.repeat_interleave(top_k))
        probabilities = probabilities + (layer.double() * counts.unsqueeze(1)).sum(dim=0)
    return Routing(taken, probabilities, counts.sum() * len(router_logits))


def experts_a_token(config: PreTrainedConfig) -> int | None:
    """How many experts a token takes; None of a model whose routers transformers does not show."""
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None or "output_router_logits" not in inspect.signature(kind.forward).parameters:
        return None
    return getattr(config.get_text_config(), "num_experts_per_tok", None)
