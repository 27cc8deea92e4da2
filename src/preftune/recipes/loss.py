"""From options to the loss."""

from preftune.config.dpo import DPOConfig
from preftune.losses import Loss, NegativeLogLikelihood, UnpairedLoss, combine, make_loss


def describe_sync(config: DPOConfig, num_steps: int) -> list[str]:
    """Sentences on a reference that follows the policy, for people."""
    every = config.reference_sync_steps
    if not config.sync_reference or every is None:
        return []
    said = [
        "the reference runs beside the policy: a copy of its weights, and a forward more in each "
        f"micro-batch; every {every} steps it becomes {config.reference_mixup_alpha:g} x policy + "
        f"{1 - (config.reference_mixup_alpha or 0):g} x reference"
    ]
    if every >= num_steps:
        said.append(
            f"reference_sync_steps is {every}, and the run has {num_steps} steps: no step is "
            "trained against a reference that has moved"
        )
    return said


def loss_of(config: DPOConfig) -> Loss | UnpairedLoss | NegativeLogLikelihood:
    """The loss, or the sum of losses, that a run minimises.

    Args:
        config: checked.
    """
    if config.stage == "sft":
        return NegativeLogLikelihood()
    losses = [make_loss(loss, **config.knobs_of(loss)) for loss in config.loss_types]
    on_pairs = [loss for loss in losses if isinstance(loss, Loss)]
    if len(on_pairs) < len(losses):
        return losses[0]  # the config has refused sums with it
    weights = config.loss_weights or [1.0] * len(losses)
    return combine(on_pairs, weights, config.sft_weight, config.sft_reduction or "sequence")
