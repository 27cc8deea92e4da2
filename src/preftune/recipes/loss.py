"""From options to the loss."""

from preftune.config.dpo import DPOConfig
from preftune.losses import Loss, UnpairedLoss, combine, make_loss


def loss_of(config: DPOConfig) -> Loss | UnpairedLoss:
    """The loss, or the sum of losses, that a run minimises.

    Args:
        config: checked.
    """
    losses = [make_loss(loss, **config.knobs_of(loss)) for loss in config.loss_types]
    on_pairs = [loss for loss in losses if isinstance(loss, Loss)]
    if len(on_pairs) < len(losses):
        return losses[0]  # the config has refused sums with it
    weights = config.loss_weights or [1.0] * len(losses)
    return combine(on_pairs, weights, config.sft_weight, config.sft_reduction or "sequence")
