"""Settings that preference tuning is known to break at: said with their source, never refused."""

from preftune.config.experiment import ExperimentConfig
from preftune.losses.spec import DPOLossType
from preftune.model.adapters import skeleton
from preftune.model.load import load_model_config

LARGE = 1_000_000_000
"""Parameters from which a model that trains whole is known to break above `FULL_RATE`."""
FULL_RATE = 5e-6
LORA_RATE = 5e-5
EPOCHS = 3


def risky_settings(config: ExperimentConfig, num_epochs: float) -> list[str]:
    """A sentence a setting, for people: its value, where it is known to break, and the source.

    Args:
        config: of the run, with commits as revisions.
        num_epochs: passes over the training pairs.
    """
    if config.stage != "dpo":
        return []  # what is known is of preference tuning
    found = _risky_rate(config) + _risky_betas(config)
    if num_epochs > EPOCHS:
        found.append(
            f"the pairs are seen {num_epochs:.3g} times: DPO has been seen to overfit after 1 to "
            f"{EPOCHS} passes (Zephyr, arXiv:2310.16944, section 5); --num_epochs 1 is usual"
        )
    return found


def _risky_rate(config: ExperimentConfig) -> list[str]:
    rate = config.peak_rate
    if config.use_lora:
        if rate <= LORA_RATE:
            return []
        return [
            f"learning_rate is {rate:g}, and adapters train: above {LORA_RATE:g} preference tuning "
            "with LoRA has been seen to break (LLaMA-Factory issue 7734: 1e-4); published runs "
            "take about 5e-6 (alignment handbook, Zephyr with QLoRA)"
        ]
    if rate <= FULL_RATE or (size := _num_parameters(config)) < LARGE:
        return []
    return [
        f"learning_rate is {rate:g}, and all {size / 1e9:.1f} billion parameters train: above "
        f"{FULL_RATE:g} models of this size have been seen to break (SimPO's README: 1e-5 "
        "degrades them); published runs take 2e-7 to 2.5e-6 (Tülu 3, OLMo 2, SimPO)"
    ]


def _risky_betas(config: ExperimentConfig) -> list[str]:
    found = []
    for loss in config.loss_types:
        beta = float(config.knobs_of(loss).get("beta", 1.0))
        if loss is DPOLossType.DPO and beta > 1:
            found.append(
                f"beta is {beta:g} with the loss dpo: above 1 the policy hardly leaves the "
                "reference; published runs take 0.01 to 0.5 (DPO, arXiv:2305.18290; Zephyr). "
                "Values like 5 are for dpo_norm, which divides by length"
            )
        if loss is DPOLossType.DPO_NORM and beta < 1:
            found.append(
                f"beta is {beta:g} with the loss dpo_norm, which divides by length: below 1 little "
                "holds the policy near the reference; Tülu 3 takes 5 (arXiv:2411.15124). Values "
                "like 0.1 are for dpo"
            )
    return found


def _num_parameters(config: ExperimentConfig) -> int:
    model = skeleton(load_model_config(config), trust_remote_code=config.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())
