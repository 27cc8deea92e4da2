"""From hidden states to log-probabilities of given tokens, at the scored positions only."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to its logits after the head's matrix product.

    `None` or 1.0 where a model does nothing of the kind.
    """

    softcap: float | None = None
    """Gemma 2: logits become softcap * tanh(logits / softcap)."""
    scale: float = 1.0
    """Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`."""

    @classmethod
    def from_config(cls, config: object) -> "HeadTransform":
        """Read the transform from a transformers model config."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(softcap=float(softcap) if softcap else None, scale=scale)

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply scale, then soft-cap."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def token_logps(
    hidden: Float[Tensor, "scored hidden"],
    head: nn.Module,
    labels: Int[Tensor, " scored"],
    transform: HeadTransform,
    *,
    with_alignment: bool = False,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"] | None]:
    """Log-probability of each label, in nats.

    The product runs in the dtype of the weights or of autocast; the log-sum-exp runs in fp32, or
    in fp64 where the logits are fp64.

    Args:
        hidden: outputs of the last layer at the scored positions.
        head: the output embedding.
        labels: the token that each position should predict.
        transform: what this model does to its logits.
        with_alignment: also return log p(label) - log sum_v p(v)^2, without gradient: the token
            weight of WPO (arXiv:2406.11827, section 4).

    Returns:
        Log-probs, and the alignments or None.
    """
    logits = transform(head(hidden))
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    log_normaliser = logits.logsumexp(dim=-1)
    logps = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - log_normaliser
    if not with_alignment:
        return logps, None
    with torch.no_grad():
        log_sum_p2 = (2.0 * logits).logsumexp(dim=-1) - 2.0 * log_normaliser
        return logps, logps.detach() - log_sum_p2
