"""Values that are known to break preference tuning are said, in `check` and in `train`."""

import re

import pytest
from transformers import LlamaConfig

from preftune import train
from preftune.config.experiment import ExperimentConfig
from preftune.recipes.check import check
from preftune.recipes.lint import risky_settings
from tests.runs import tiny_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Configurations alone: the sizes of Llama 3.2 1B (1.24 billion parameters) and of 0.9."""
    root = tmp_path_factory.mktemp("models")
    for name, num_layers in (("1b", 16), ("below", 10)):
        LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(root / name)
    return root


def said(models, model="1b", **settings):
    config = ExperimentConfig(
        model_name_or_path=str(models / model), dataset_name="pairs.jsonl", **settings
    )
    return risky_settings(config, config.num_epochs)


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"learning_rate": 6e-6}, r"learning_rate is 6e-06, and all 1\.2 billion .* above 5e-06 "),
        ({"learning_rate": 6e-5, "use_lora": True}, r"learning_rate is 6e-05, and adapters train"),
        ({"loss_type": "dpo_norm", "beta": 0.5}, r"beta is 0\.5 with the loss dpo_norm"),
        ({"beta": 5.0}, r"beta is 5 with the loss dpo: .*2305\.18290"),
        ({"loss_type": ["ipo", "dpo"], "beta": 2.0}, r"beta is 2 with the loss dpo: "),
        ({"num_epochs": 3.5}, r"the pairs are seen 3\.5 times: .*2310\.16944"),
    ],
    ids=str,
)
def test_each_is_said_with_its_source(models, settings, pattern):
    (sentence,) = said(models, **settings)
    assert re.search(pattern, sentence)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learning_rate": 5e-6, "num_epochs": 3.0},
        {"learning_rate": 1e-4, "model": "below"},
        {"learning_rate": 5e-5, "use_lora": True},
        {"beta": 1.0},
        {"loss_type": "dpo_norm"},
        {"loss_type": "dpo_norm", "beta": 1.0},
        {"loss_type": "simpo"},
        {"loss_type": "ipo", "beta": 5.0},
        {"stage": "sft", "learning_rate": 2e-5, "num_epochs": 5.0},
    ],
    ids=str,
)
def test_what_is_usual_is_not(models, settings):
    assert said(models, **settings) == []


def test_check_and_train_say_it_and_go_on(tmp_path, capfd):
    config = tiny_config(tmp_path, beta=5.0, num_epochs=None, max_train_steps=10, progress="plain")
    told = check(config)
    train(config)
    err = capfd.readouterr().err
    for sentence in ("beta is 5 with the loss dpo: ", "the pairs are seen 3.33 times: "):
        assert sentence in told
        assert sentence in err
