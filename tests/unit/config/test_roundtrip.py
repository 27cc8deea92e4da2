"""config -> YAML -> config is an identity, and config -> dict -> config too."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune import __version__
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.config.score import ScoreConfig
from preftune.errors import ConfigError
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType

NEEDED = {"model_name_or_path": "m", "dataset_name": "pairs.jsonl"}
SCHEDULES = ("linear", "cosine", "cosine_with_min_lr", "constant_with_warmup", "polynomial", "wsd")

# Text that YAML would read as something else, and text of any characters a path may hold.
tricky = [
    "no",
    "null",
    "~",
    "5e-7",
    "010",
    "true",
    "a: b",
    "# c",
    "- d",
    "{e}",
    "1:30",
    " f ",
    "é\n",
    "a\x85b",
]
text = st.sampled_from(tricky) | st.text(min_size=1, max_size=12)
fraction = st.floats(0, 1, exclude_min=True, exclude_max=True)
positive = st.floats(0, 1e30, exclude_min=True)
counts = st.integers(1, 10**9)
seeds = st.integers(0, 2**32 - 1)
names = text.filter(lambda name: make_is_fine(run_name=name))
labels = st.from_regex(r"[\w.-]{1,8}", fullmatch=True)
amounts = counts | st.floats(1e-9, 1e9)
mixers = st.dictionaries(text, amounts, min_size=1, max_size=3)
sources = st.one_of(
    st.just({"dataset_name": "pairs.jsonl"}),
    mixers.map(lambda mixer: {"dataset_mixer": mixer}),
    mixers.map(lambda mixer: {"dataset_mixer_list": [x for pair in mixer.items() for x in pair]}),
)


def make_is_fine(**given):
    try:
        ExperimentConfig(**NEEDED, **given)
    except ConfigError:
        return False
    return True


def given_or_not(**fields):
    """Any subset of some settings."""
    return st.fixed_dictionaries({}, optional=fields)


def knob_values(loss, name):
    knob = LOSS_SPECS[loss].knob(name)
    if knob.choices:
        return st.sampled_from(knob.choices)
    numbers = knob.numbers
    ends = {"exclude_min": numbers.low_open, "exclude_max": numbers.high_open}
    return st.floats(max(numbers.low, -1e9), min(numbers.high, 1e9), **ends)


def loss_and_knobs(loss):
    """A loss and any knobs that it reads together."""
    spec = LOSS_SPECS[loss]
    every = {name: knob_values(loss, name) for name in spec.knobs}

    def of_this_loss(given):
        read = {name: given[name] for name in spec.applying(given) if name in given}
        return {"loss_type": loss.value, **read}

    return given_or_not(**every).map(of_this_loss)


losses = st.sampled_from(list(DPOLossType)).flatmap(loss_and_knobs) | st.fixed_dictionaries(
    {"loss_type": st.sampled_from([["dpo", "bco_pair"], ["exo_pair", "wpo"]])},
    optional={
        "loss_weights": st.lists(positive, min_size=2, max_size=2),
        "sft_weight": positive,
        "beta": positive,
        "ld_alpha": fraction,
    },
)
lengths = given_or_not(num_epochs=positive) | given_or_not(max_train_steps=counts)
warmups = st.one_of(
    given_or_not(lr_scheduler_type=st.sampled_from(SCHEDULES), warmup_ratio=fraction),
    given_or_not(lr_scheduler_type=st.sampled_from(SCHEDULES), warmup_steps=st.integers(0, 99)),
    st.just({"lr_scheduler_type": "constant"}),
)
optimizers = st.one_of(
    st.just({"optimizer": "sgd"}),
    given_or_not(
        optimizer=st.sampled_from(["adamw_torchao_4bit", "paged_adamw_8bit"]),
        adam_beta1=fraction,
        adam_beta2=fraction,
        adam_epsilon=positive,
    ),
    given_or_not(optimizer=st.just("muon"), adam_beta1=fraction),
    st.fixed_dictionaries({"optimizer": st.just("muon"), "muon_momentum": fraction}),
    st.just({"optimizer": "adafactor"}),
)
evaluations = st.one_of(
    st.fixed_dictionaries({"test_size": fraction | counts}, optional={"eval_steps": counts}),
    st.fixed_dictionaries(
        {"eval_dataset": text | st.dictionaries(labels, text, min_size=1, max_size=3)},
        optional={"eval_steps": fraction, "per_device_eval_batch_size": counts},
    ),
    given_or_not(eval_strategy=st.just("never")),
)
others = given_or_not(
    model_revision=st.none() | text,
    output_dir=text,
    resume=text,
    cache_dir=text,
    seed=seeds,
    learning_rate=positive,
    max_grad_norm=st.none() | positive | st.just(0),
    weight_decay=positive,
    column_map=st.none() | st.dictionaries(st.sampled_from(["prompt", "chosen"]), text),
    exp_name=names,
    run_name=st.none() | names,
    use_cache=st.booleans(),
    report_to=st.sampled_from([None, "wandb", "none", [], ["tensorboard", "mlflow"]]),
    dataset_transforms=st.lists(text.filter(lambda name: ":" not in name), min_size=1, max_size=3),
    num_proc=st.none() | counts,
    dataset_cache_mode=st.sampled_from(["local", "hub", "off"]),
    max_length=st.none() | st.integers(2, 10**9),
    checkpointing_steps=st.none() | st.just("epoch") | counts,
    keep_last_n_checkpoints=st.none() | counts,
    mixed_precision=st.sampled_from(["auto", "fp32", "bf16", "fp16", "no"]),
    concatenated_forward=st.none() | st.booleans(),
    progress=st.sampled_from(["auto", "rich", "plain", "none"]),
)
pushes = given_or_not() | st.fixed_dictionaries(
    {"push_to_hub": st.just(True), "hub_repo_id": st.just("ann/tiny")},
    optional={
        "hub_private": st.booleans(),
        "hub_revision": st.sampled_from(["main", "v1/b"]),
        "hub_strategy": st.just("end"),
    },
)
orders = st.fixed_dictionaries({"shuffle": st.just(False)}) | st.fixed_dictionaries(
    {"shuffle": st.just(True), "data_seed": st.none() | seeds}
)
syncs = given_or_not(reference_mixup_alpha=fraction, reference_sync_steps=counts)


def experiment(parts, sync):
    """A configuration; one whose reference follows the policy, where the loss reads any."""
    options = {"model_name_or_path": "m"} | {k: v for part in parts for k, v in part.items()}
    config = ExperimentConfig(**options)
    if not config.needs_reference:
        return config
    return ExperimentConfig(**options, sync_reference=True, **sync) if sync else config


configs = st.builds(
    experiment,
    st.tuples(sources, orders, losses, lengths, warmups, optimizers, evaluations, pushes, others),
    syncs,
)


def reloaded(config):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(config.to_yaml(), encoding="utf-8")
        return parse_config(type(config), [str(path)])


@settings(deadline=None, max_examples=60)
@given(configs)
def test_reading_back_what_was_written_is_the_identity(config):
    assert reloaded(config) == config
    assert ExperimentConfig(**config.to_dict()) == config
    from_json = ExperimentConfig(**json.loads(json.dumps(config.to_dict())))
    assert from_json == config
    # 1 and 1.0 are equal, and not the same amount.
    assert repr(from_json.sources) == repr(reloaded(config).sources) == repr(config.sources)
    assert reloaded(config).to_yaml() == config.to_yaml()


@pytest.mark.parametrize("loss", list(DPOLossType))
def test_every_loss_reloads_with_only_its_own_knobs(loss):
    config = ExperimentConfig(**NEEDED, loss_type=loss)
    assert reloaded(config) == config
    assert KNOBS.keys() & config.to_dict().keys() == LOSS_SPECS[loss].applying({}).keys()


def test_scoring_reloads_too():
    for given_values in ({}, {"reference_model_name_or_path": "r", "output": "a.parquet"}):
        config = ScoreConfig(**NEEDED, **given_values)
        assert reloaded(config) == config


def test_a_written_config_names_its_version_and_stays_on_lines():
    config = ExperimentConfig(
        model_name_or_path="m", dataset_mixer={"a": 1, "no": 1.0}, dataset_transforms=["x", "y:z"]
    )
    lines = config.to_yaml().splitlines()
    assert lines[0] == f"preftune_version: {__version__}"
    assert {"dataset_mixer: {a: 1, 'no': 1.0}", "dataset_transforms: [x, 'y:z']"} <= {*lines}
    assert "preftune_version" not in config.to_dict()


def test_an_explicit_null_is_written_where_null_is_not_the_default():
    config = ExperimentConfig(**NEEDED, max_grad_norm=0, max_length=None)
    assert "max_grad_norm: null\n" in config.to_yaml()
    assert "max_length: null\n" in config.to_yaml()
    assert "data_seed" not in config.to_yaml()
