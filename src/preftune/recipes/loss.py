"""From options to the loss."""

from preftune.config.dpo import DPOConfig
from preftune.losses import Loss, combine, make_loss


def loss_of(config: DPOConfig) -> Loss:
    """The loss, or the sum of losses, that a run minimises.

    Args:
        config: checked.
    """
    losses = [make_loss(loss, **config.knobs_of(loss)) for loss in config.loss_types]
    return combine(losses, config.loss_weights or [1.0] * len(losses), config.sft_weight)
