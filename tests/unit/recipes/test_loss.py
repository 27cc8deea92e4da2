"""The loss that a run minimises is the one its options ask for."""

import pytest

from preftune.config.experiment import ExperimentConfig
from preftune.losses import Combined
from preftune.losses.bco_pair import BCOPair
from preftune.losses.dpo import DPO
from preftune.losses.exo_pair import EXOPair
from preftune.recipes.loss import loss_of


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, DPO()),
        ({"beta": 0.3, "f_divergence": "js"}, DPO(beta=0.3, f_divergence="js")),
        ({"sft_weight": 0.5}, Combined((DPO(),), (1.0,), 0.5)),
        (
            {"sft_weight": 0.5, "sft_reduction": "token"},
            Combined((DPO(),), (1.0,), 0.5, "token"),
        ),
        ({"loss_type": ["dpo", "exo_pair"]}, Combined((DPO(), EXOPair()), (1.0, 1.0))),
        (
            {"loss_type": ["dpo", "bco_pair"], "beta": 0.2, "loss_weights": [0.8, 0.2]},
            Combined((DPO(beta=0.2), BCOPair(beta=0.2)), (0.8, 0.2)),
        ),
    ],
    ids=str,
)
def test_the_loss_of_options(given, loss):
    assert loss_of(ExperimentConfig(model_name_or_path="m", dataset_name="d", **given)) == loss
