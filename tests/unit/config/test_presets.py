"""Presets: what they set, what a user's value puts out, and that every one runs with every loss."""

import json

import pytest

from preftune.cli.config import annotated
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config, parse_with_places
from preftune.config.preset import preset_names, preset_path, preset_summary
from preftune.config.yamlfile import read_yaml
from preftune.errors import ConfigError
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType

MODEL = ("--model_name_or_path", "m")
DATA = ("--dataset_name", "d")


def preset(name, *argv):
    return parse_with_places(ExperimentConfig, ["--preset", name, *argv])


def problems(*argv):
    with pytest.raises(ConfigError) as caught:
        parse_config(ExperimentConfig, argv)
    return caught.value.problems


SUPERVISED = ["handbook-sft"]
ON_PAIRS = [name for name in preset_names() if name not in SUPERVISED]


@pytest.mark.parametrize("loss", [loss.value for loss in DPOLossType])
@pytest.mark.parametrize("name", ON_PAIRS)
def test_every_preset_with_every_loss_is_shown_as_a_config_that_reloads(tmp_path, name, loss):
    parsed = preset(name, *MODEL, *DATA, "--loss_type", loss)
    file = tmp_path / "shown.yaml"
    file.write_text(annotated(parsed), encoding="utf-8")
    assert parse_config(ExperimentConfig, [str(file)]) == parsed.config
    values = json.loads(json.dumps(parsed.config.to_dict()))
    assert ExperimentConfig(**values) == parsed.config
    own = LOSS_SPECS[loss].applying({})
    if read_preset(name)["loss_type"] == loss:
        own |= {key: float(value) for key, value in read_preset(name).items() if key in KNOBS}
    assert parsed.config.knobs_of(DPOLossType(loss)) == own


def read_preset(name):
    return {entry.key: entry.value for entry in read_yaml(str(preset_path(name)))}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_says_what_it_is_and_where_it_is_from(name):
    text = preset_path(name).read_text(encoding="utf-8")
    head = text[: text.index("\n\n")] if "\n\n" in text else text
    assert text.startswith(f"# {preset_summary(name)}\n")
    assert "# Source: " in head
    assert "# Left out: " in head
    assert all(len(line) <= 104 for line in text.splitlines())


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_preset_of_fine_tuning_is_shown_as_a_config_that_reloads(tmp_path, name):
    parsed = preset(name, *MODEL, *DATA)
    file = tmp_path / "shown.yaml"
    file.write_text(annotated(parsed), encoding="utf-8")
    assert parse_config(ExperimentConfig, [str(file)]) == parsed.config


PUBLISHED = {
    # name: loss, beta, learning rate, schedule, warm-up (a share, or steps), global batch, longest
    # pair and prompt
    "tulu3-8b": ("dpo_norm", 5.0, 5e-7, "linear", 0.1, 128, 2048, None),
    "tulu3-70b": ("dpo_norm", 5.0, 2e-7, "linear", 0.1, 128, 2048, None),
    "olmo2-7b": ("dpo_norm", 5.0, 1e-6, "linear", 0.1, 128, 2048, None),
    "simpo-llama3-8b": ("simpo", 2.5, 1e-6, "cosine", 0.1, 128, 2048, 1800),
    "zephyr-7b": ("dpo", 0.01, 5e-7, "cosine", 0.1, 128, 1024, 512),
    "zephyr-7b-lora": ("dpo", 0.01, 5e-6, "cosine", 0.1, 32, 1024, 512),
    "handbook-sft": (None, None, 3e-4, "linear", 10, 16, 2048, None),
    "handbook-dpo": ("dpo", 0.5, 2e-6, "linear", 10, 16, 1024, 1024),
    "qlora-single-gpu": ("dpo", 0.1, 5e-6, "cosine", 0.1, 16, 1024, 512),
    "laptop": ("dpo", 0.1, 1e-6, "linear", 0.1, 8, 512, 256),
}
# name: rank, alpha, dropout, number of kinds of layers
ADAPTERS = {
    "zephyr-7b-lora": (16, 16, 0.05, 7),
    "handbook-sft": (32, 32, 0.0, 7),
    "handbook-dpo": (32, 32, 0.0, 7),
    "qlora-single-gpu": (16, 32, 0.0, "all-linear"),
}


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_sets_what_is_published(name):
    whole = "model_name_or_path" in read_preset(name)
    config = preset(name, *(() if whole else MODEL + DATA)).config
    batch = config.global_batch_size(shares=1)
    lengths = (config.max_length, config.max_prompt_length)
    rates = (
        config.learning_rate,
        config.lr_scheduler_type,
        config.warmup_ratio or config.warmup_steps,
    )
    assert (config.loss_type, config.beta, *rates, batch, *lengths) == PUBLISHED[name]
    epochs = 3.0 if name == "handbook-sft" else 1.0
    assert (config.num_epochs, config.max_train_steps) == (epochs, None)
    if name == "simpo-llama3-8b":
        assert config.gamma_beta_ratio == 0.55


@pytest.mark.parametrize("name", preset_names())
def test_what_trains_and_how_the_base_is_held(name):
    whole = "model_name_or_path" in read_preset(name)
    config = preset(name, *(() if whole else MODEL + DATA)).config
    assert config.use_lora == (name in ADAPTERS)
    assert config.load_in_4bit == (name in ("zephyr-7b-lora", "qlora-single-gpu"))
    if config.use_lora:
        layers = config.lora_target_modules
        kinds = len(layers) if isinstance(layers, list) else layers
        adapter = (config.lora_r, config.lora_alpha, config.lora_dropout, kinds)
        assert adapter == ADAPTERS[name]
    if name.startswith("handbook"):
        assert (config.optimizer, config.weight_decay) == ("adamw_8bit", 0.01)
        assert (config.test_size, config.logging_steps) == (0.05, 1)
        assert config.mixed_precision == "auto"
        assert config.eval_steps == (0.2 if name == "handbook-dpo" else None)


def test_the_command_line_wins_over_the_file_the_file_over_the_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("preset: tulu3-8b\nlearning_rate: 3e-7\nbeta: 4\n", encoding="utf-8")
    parsed = parse_with_places(ExperimentConfig, [str(file), "--beta", "3"])
    config, given = parsed.config, parsed.given
    assert (config.beta, config.learning_rate, config.max_length) == (3.0, 3e-7, 2048)
    assert given["beta"].place == "command line"
    assert given["learning_rate"].place == f"{file} line 2"
    assert given["max_length"].place == "preset tulu3-8b"
    assert "preset" not in config.to_dict()
    other = parse_with_places(ExperimentConfig, [str(file), "--preset=olmo2-7b"])
    assert other.given["model_name_or_path"].place == "preset olmo2-7b"
    assert other.config.learning_rate == 3e-7


@pytest.mark.parametrize(
    ("name", "argv", "expected"),
    [
        ("tulu3-8b", "--dataset_mixer {a:1.0}", {"dataset_name": None}),
        ("tulu3-8b", "--dataset_mixer_list a 1 b 2", {"dataset_name": None}),
        ("zephyr-7b", "--dataset_name d.jsonl", {"dataset_split": "train"}),
        ("zephyr-7b", "--beta 1", {"dataset_split": "train_prefs"}),
        ("tulu3-8b", "--max_train_steps 9", {"num_epochs": None}),
        ("tulu3-8b", "--max_train_steps null", {"num_epochs": 1.0, "max_train_steps": None}),
        ("tulu3-8b", "--warmup_steps 9", {"warmup_ratio": None}),
        ("tulu3-8b", "--lr_scheduler_type constant", {"warmup_ratio": None}),
        ("tulu3-8b", "--loss_type dpo", {"beta": 0.1}),
        ("tulu3-8b", "--loss_type dpo_norm", {"beta": 5.0}),
        ("tulu3-8b", "--loss_type simpo --beta 3", {"beta": 3.0, "gamma_beta_ratio": 0.5}),
        ("laptop", "--model_name_or_path m --dataset_name d --loss_type wpo", {"beta": 0.1}),
        ("simpo-llama3-8b", "--loss_type dpo", {"gamma_beta_ratio": None, "beta": 0.1}),
        ("simpo-llama3-8b", "--max_prompt_length null", {"max_prompt_length": None}),
    ],
)
def test_a_users_value_puts_out_what_would_contradict_it(name, argv, expected):
    argv = argv.replace("{a:1.0}", "{a:_1.0}").split()
    config = preset(name, *(word.replace("_1.0", " 1.0") for word in argv)).config
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_text_of_a_mistake():
    listed = (
        "handbook-dpo, handbook-sft, laptop, olmo2-7b, qlora-single-gpu, simpo-llama3-8b, "
        "tulu3-70b, tulu3-8b, zephyr-7b or zephyr-7b-lora"
    )
    assert problems("--preset", "zephir-7b") == [
        f"command line: --preset is 'zephir-7b'; it must be {listed} (did you mean zephyr-7b?)"
    ]
    assert problems("--preset", "simpo", "--seed=-1") == [
        f"command line: --preset is 'simpo'; it must be {listed} (did you mean simpo-llama3-8b?)",
        "command line: --seed is -1; it must be from 0 to 4294967295",
    ]
    assert problems("--preset", "tulu3-8b", "--max_length", "9", "--max_prompt_length", "10") == [
        "command line: --max_prompt_length is 10; it must not be above max_length (9)"
    ]
    assert problems("--preset", "zephyr-7b", "--max_length", "9") == [
        "preset zephyr-7b: max_prompt_length is 512; it must not be above max_length (9)"
    ]
    assert problems("--preset", "--preset=laptop")[:1] == [
        "command line: --preset has no value; see `preftune config presets`"
    ]


def test_what_is_defaulted_is_what_nobody_gave():
    parsed = preset("tulu3-8b", "--seed", "7", "--max_grad_norm", "null", "--data_seed", "null")
    defaulted = parsed.defaulted
    assert defaulted["label_smoothing"] == 0.0
    assert defaulted["run_name"] == "preftune__7"
    assert {"seed", "beta", "max_grad_norm", "data_seed", "num_epochs"}.isdisjoint(defaulted)
    assert preset("tulu3-8b", "--num_epochs", "null").defaulted["num_epochs"] == 1.0
