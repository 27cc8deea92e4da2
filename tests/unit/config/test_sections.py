"""Each rule of the sections, by its effect."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from preftune.config.composed import ComposedConfig, sections
from preftune.config.dataset import DatasetConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import ModelConfig
from preftune.config.problem import InvalidConfig
from preftune.config.score import ScoreConfig
from preftune.config.training import TrainingConfig
from preftune.errors import ConfigError
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType

NEEDED = {"model_name_or_path": "m", "dataset_name": "pairs.jsonl"}

BEST = {"test_size": 5, "metric_for_best_model": "eval/loss"}
ONLY_MIXED = {"dataset_name": None}


def make(**given):
    return ExperimentConfig(**{**NEEDED, **given})


def problem_keys(config, **given):
    with pytest.raises(InvalidConfig) as caught:
        config(**given)
    assert [str(problem) for problem in caught.value.found] == caught.value.problems
    return [problem.key for problem in caught.value.found]


BAD = [
    ({"model_name_or_path": None}, "model_name_or_path"),
    ({"dataset_name": None}, "dataset_name"),
    ({"seed": -1}, "seed"),
    ({"exp_name": "a/b"}, "exp_name"),
    ({"exp_name": "a\nb"}, "exp_name"),
    ({"run_name": "a\\b"}, "run_name"),
    ({"run_name": "a\x7fb"}, "run_name"),
    ({"tokenizer_revision": "main"}, "tokenizer_revision"),
    ({"use_cache": True, "gradient_checkpointing": True}, "use_cache"),
    ({"use_cache": True, "gradient_checkpointing": "selective"}, "use_cache"),
    ({"activation_offload": True}, "activation_offload"),
    ({"activation_offload": True, "gradient_checkpointing": "selective"}, "activation_offload"),
    ({"dataset_mixer": {"a": 1.0}}, "dataset_name"),
    ({"sample_steps": 0}, "sample_steps"),
    ({"sample_steps": 1.0}, "sample_steps"),
    ({"sample_steps": 5, "num_samples": 0}, "num_samples"),
    ({"num_samples": 8}, "num_samples"),
    ({"sample_steps": 5, "sample_max_new_tokens": 0}, "sample_max_new_tokens"),
    ({"sample_max_new_tokens": 64}, "sample_max_new_tokens"),
    ({"sample_steps": 5, "fsdp": "full_shard"}, "sample_steps"),
    ({"sample_steps": 5, "zero_stage": 3}, "sample_steps"),
    ({"test_size": 5, "eval_kl_samples": 1}, "eval_kl_samples"),
    ({"test_size": 5, "eval_kl_samples": 9, "zero_stage": 3}, "eval_kl_samples"),
    ({"eval_kl_samples": 9}, "eval_kl_samples"),
    ({"eval_on_start": True}, "eval_on_start"),
    ({"test_size": 5, "eval_strategy": "never", "eval_on_start": True}, "eval_on_start"),
    ({"test_size": 5, "eval_strategy": "never", "eval_kl_samples": 9}, "eval_kl_samples"),
    ({"test_size": 5, "early_stopping_patience": 2}, "early_stopping_patience"),
    ({**BEST, "early_stopping_patience": 0}, "early_stopping_patience"),
    ({**BEST, "early_stopping_threshold": 0.1}, "early_stopping_threshold"),
    (
        {**BEST, "early_stopping_patience": 1, "early_stopping_threshold": -0.1},
        "early_stopping_threshold",
    ),
    ({"test_size": 5, "load_best_model_at_end": True}, "load_best_model_at_end"),
    ({"dataset_mixer_list": ["a", "1"]}, "dataset_name"),
    ({"dataset_mixer": {"a": 1}, "dataset_mixer_list": ["a", 1]}, "dataset_name"),
    ({**ONLY_MIXED, "dataset_mixer": {}}, "dataset_mixer"),
    ({**ONLY_MIXED, "dataset_mixer": {"a": 0}}, "dataset_mixer"),
    ({**ONLY_MIXED, "dataset_mixer": {"a": 0.0}}, "dataset_mixer"),
    ({**ONLY_MIXED, "dataset_mixer": {"a": -1}}, "dataset_mixer"),
    ({**ONLY_MIXED, "dataset_mixer_list": []}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a"]}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a", "1", "b"]}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a", "b"]}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a", "0"]}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a", "nan"]}, "dataset_mixer_list"),
    ({**ONLY_MIXED, "dataset_mixer_list": ["a", "1", "a", "2"]}, "dataset_mixer_list"),
    ({"eval_dataset": {}}, "eval_dataset"),
    ({"eval_dataset": {"a/b": "e"}}, "eval_dataset"),
    ({"dataset_transforms": []}, "dataset_transforms"),
    ({"dataset_transforms": ["a:1b"]}, "dataset_transforms"),
    ({"dataset_transforms": [":b"]}, "dataset_transforms"),
    ({"dataset_transforms": ["a-b:c"]}, "dataset_transforms"),
    ({"num_proc": 0}, "num_proc"),
    ({"cache_dataset_only": True, "dataset_cache_mode": "off"}, "cache_dataset_only"),
    ({"report_to": ["tensorboard", "tensorboard"]}, "report_to"),
    ({"data_seed": 2**32}, "data_seed"),
    ({"chat_template": "chatlm"}, "chat_template"),
    ({"beta": 0.0}, "beta"),
    ({"label_smoothing": 0.5}, "label_smoothing"),
    ({"loss_type": "simpo", "gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
    ({"gamma_beta_ratio": 0.5}, "gamma_beta_ratio"),
    ({"wpo_alignment": "none"}, "wpo_alignment"),
    ({"f_divergence_alpha": 0.5}, "f_divergence_alpha"),
    ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "label_smoothing"),
    ({"loss_type": ["dpo", "exo_pair"], "label_smoothing": 0.0}, "label_smoothing"),
    ({"loss_type": ["dpo", "wpo"], "gamma_beta_ratio": 0.5}, "gamma_beta_ratio"),
    ({"loss_type": ["dpo", "dpo"]}, "loss_type"),
    ({"loss_type": []}, "loss_type"),
    ({"loss_type": ["dpo", "wpo"], "loss_weights": [1.0]}, "loss_weights"),
    ({"loss_weights": [0.0]}, "loss_weights"),
    ({"sft_weight": -0.1}, "sft_weight"),
    ({"sft_reduction": "token"}, "sft_reduction"),
    ({"sft_reduction": "sequence", "sft_weight": 0}, "sft_reduction"),
    ({"ld_alpha": 1.1}, "ld_alpha"),
    ({"ld_alpha": -0.1}, "ld_alpha"),
    ({"loss_type": ["dpo", "simpo"], "ld_alpha": 0.5}, "ld_alpha"),
    ({"load_balancing_weight": -0.01}, "load_balancing_weight"),
    ({"reference_mixup_alpha": 0.6}, "reference_mixup_alpha"),
    ({"reference_sync_steps": 8}, "reference_sync_steps"),
    ({"sync_reference": True, "reference_mixup_alpha": 0.0}, "reference_mixup_alpha"),
    ({"sync_reference": True, "reference_mixup_alpha": 1.1}, "reference_mixup_alpha"),
    ({"sync_reference": True, "reference_sync_steps": 0}, "reference_sync_steps"),
    ({"sync_reference": True, "loss_type": "simpo"}, "sync_reference"),
    ({"sync_reference": True, "loss_type": ["orpo", "cpo"]}, "sync_reference"),
    ({"forward_layout": "separate", "concatenated_forward": True}, "concatenated_forward"),
    ({"forward_layout": "concatenated", "concatenated_forward": False}, "concatenated_forward"),
    ({"num_epochs": 0.0}, "num_epochs"),
    ({"max_train_steps": 0}, "max_train_steps"),
    ({"num_epochs": 1.0, "max_train_steps": 5}, "num_epochs"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
    ({"per_device_eval_batch_size": 0, "test_size": 1}, "per_device_eval_batch_size"),
    ({"per_device_eval_batch_size": 4}, "per_device_eval_batch_size"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
    ({"learning_rate": 0.0}, "learning_rate"),
    ({"learning_rate": -1e-6}, "learning_rate"),
    ({"warmup_ratio": 1.0}, "warmup_ratio"),
    ({"warmup_steps": -1}, "warmup_steps"),
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "warmup_ratio"),
    ({"lr_scheduler_type": "constant", "warmup_ratio": 0.0}, "warmup_ratio"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 0}, "warmup_steps"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"adam_beta1": 1.0}, "adam_beta1"),
    ({"adam_beta2": -0.1}, "adam_beta2"),
    ({"adam_epsilon": 0.0}, "adam_epsilon"),
    ({"optimizer": "adafactor", "adam_beta1": 0.9}, "adam_beta1"),
    ({"optimizer": "adafactor", "adam_epsilon": 1e-8}, "adam_epsilon"),
    ({"muon_momentum": 0.9}, "muon_momentum"),
    ({"optimizer": "muon", "muon_momentum": 1.0}, "muon_momentum"),
    ({"optimizer": "muon", "use_lora": True}, "optimizer"),
    ({"stochastic_rounding": True}, "stochastic_rounding"),
    ({"stochastic_rounding": True, "dtype": "bfloat16", "use_lora": True}, "stochastic_rounding"),
    ({"stochastic_rounding": True, "dtype": "bfloat16", "optimizer": "sgd"}, "stochastic_rounding"),
    (
        {"stochastic_rounding": True, "dtype": "bfloat16", "optimizer": "adamw_8bit"},
        "stochastic_rounding",
    ),
    ({"optimizer": "sgd", "adam_beta1": 0.9}, "adam_beta1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"column_map": {"question": "prompt"}}, "column_map"),
    ({"max_length": 1}, "max_length"),
    ({"max_prompt_length": 0}, "max_prompt_length"),
    ({"max_length": 100, "max_prompt_length": 101}, "max_prompt_length"),
    ({"max_length": None, "truncation": "keep_end"}, "truncation"),
    ({"max_dropped_fraction": 1.1}, "max_dropped_fraction"),
    ({"test_size": 0}, "test_size"),
    ({"test_size": 1.0}, "test_size"),
    ({"test_size": 0.0}, "test_size"),
    ({"test_size": 0.1, "eval_dataset": "e"}, "test_size"),
    ({"max_train_samples": 0}, "max_train_samples"),
    ({"logging_steps": 0}, "logging_steps"),
    ({"checkpointing_steps": 0}, "checkpointing_steps"),
    ({"keep_last_n_checkpoints": 0}, "keep_last_n_checkpoints"),
    ({"eval_steps": 0, "test_size": 1}, "eval_steps"),
    ({"eval_steps": 1.0, "test_size": 1}, "eval_steps"),
    ({"eval_steps": 5}, "eval_steps"),
    ({"eval_strategy": "epoch"}, "eval_strategy"),
    ({"eval_strategy": "steps", "test_size": 1}, "eval_strategy"),
    ({"eval_strategy": "epoch", "eval_steps": 5, "test_size": 1}, "eval_steps"),
    ({"eval_strategy": "never", "eval_steps": 5, "test_size": 1}, "eval_steps"),
    ({"hub_repo_id": "ann/tiny"}, "hub_repo_id"),
    ({"hub_private": False}, "hub_private"),
    ({"hub_revision": "main"}, "hub_revision"),
    ({"hub_strategy": "end"}, "hub_strategy"),
    ({"push_to_hub": True}, "hub_repo_id"),
    *(
        ({"push_to_hub": True, "hub_repo_id": name}, "hub_repo_id")
        for name in ("tiny", "a/b/c", "ann/", "ann/a--b", "ann/.a", "ann/a.git", "ann/" + "a" * 99)
    ),
    ({"push_to_hub": True, "hub_repo_id": "a/b", "hub_revision": "a b"}, "hub_revision"),
    ({"push_to_hub": True, "hub_repo_id": "a/b", "hub_revision": "refs/pr/1"}, "hub_revision"),
    (
        {
            "push_to_hub": True,
            "hub_repo_id": "a/b",
            "hub_strategy": "checkpoint",
            "checkpointing_steps": None,
        },
        "hub_strategy",
    ),
]


@pytest.mark.parametrize(
    ("given", "key"), BAD, ids=[f"{key}-{n}" for n, (_, key) in enumerate(BAD)]
)
def test_a_bad_value_is_the_one_problem_reported(given, key):
    assert problem_keys(ExperimentConfig, **{**NEEDED, **given}) == [key]


GOOD = [
    {"max_length": 1024, "max_prompt_length": 1024},
    {"max_length": None, "max_prompt_length": 99},
    {"max_length": None, "max_prompt_length": 99, "truncation": "keep_start"},
    {"test_size": 1},
    {"test_size": 0.5, "eval_steps": 0.25},
    {"eval_dataset": "e", "eval_strategy": "never"},
    {"eval_strategy": "never"},
    {"chat_template": "mine.jinja"},
    {"chat_template": "zephyr"},
    *({"chat_template": name} for name in ("llama3", "alpaca", "plain", "org/name", "./folder")),
    {"exp_name": "tulu 3, β=5", "run_name": "first"},
    {"tokenizer_name_or_path": "t", "tokenizer_revision": "main"},
    {"use_cache": True},
    {"dataset_name": None, "dataset_mixer": {"org/a:sub@main": 0.5, "b.jsonl": 2.5, "c": 1}},
    {"eval_dataset": {"held-out_1.0": "e", "b": "f"}, "eval_split": "dev"},
    {"dataset_transforms": ["strip", "my.rows:strip", "strip"], "num_proc": 1},
    {"cache_dataset_only": True, "dataset_cache_mode": "hub"},
    {"report_to": ["tensorboard"]},
    {"report_to": ["wandb", "trackio", "mlflow"]},
    {"forward_layout": "separate", "concatenated_forward": False},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0},
    {"checkpointing_steps": "epoch", "keep_last_n_checkpoints": None},
    {"checkpointing_steps": None},
    {"loss_type": "simpo", "gamma_beta_ratio": 0.0},
    {"f_divergence": "alpha", "f_divergence_alpha": 0.25},
    {"loss_type": ["dpo", "bco_pair"], "loss_weights": [0.8, 0.2], "sft_weight": 1.0},
    {"loss_weights": [2.0]},
    {"loss_type": ["dpo", "aot"], "ld_alpha": 0, "sft_weight": 0.1, "sft_reduction": "token"},
    {"loss_type": "simpo", "ld_alpha": 1.0},
    {"sync_reference": True, "reference_mixup_alpha": 1.0, "reference_sync_steps": 1},
    {"sync_reference": True, "loss_type": ["dpo", "simpo"]},
    {"sync_reference": True, "loss_type": "kto"},
    {"seed": 2**32 - 1, "data_seed": 0},
    {"push_to_hub": True, "hub_repo_id": "ann/tiny-1.0_b", "hub_revision": "exp/2"},
    {"push_to_hub": True, "hub_repo_id": "a/b", "hub_private": False, "hub_strategy": "end"},
]


@pytest.mark.parametrize("given", GOOD, ids=str)
def test_a_legal_value_is_kept(given):
    config = make(**given)
    assert {key: getattr(config, key) for key in given} == given


WRONG_TYPES = [
    ("learning_rate", "abc"),
    ("learning_rate", True),
    ("learning_rate", float("nan")),
    ("num_epochs", float("inf")),
    ("seed", 1.0),
    ("seed", True),
    ("seed", "010"),
    ("seed", "1:30"),
    ("shuffle", 1),
    ("shuffle", None),
    ("output_dir", None),
    ("output_dir", ""),
    ("output_dir", 3),
    ("loss_type", "dpoo"),
    ("loss_type", "DPO"),
    ("dtype", "float16"),
    ("mixed_precision", False),
    ("column_map", {"prompt": 1}),
    ("column_map", "prompt"),
    ("max_length", [1]),
    ("checkpointing_steps", "epochs"),
    ("test_size", "half"),
    ("exp_name", ""),
    ("run_name", ""),
    ("stage", "rl"),
    ("dataset_mixer", {"a": True}),
    ("dataset_mixer", {"a": "x"}),
    ("dataset_mixer", {"a": None}),
    ("dataset_mixer", {"": 1}),
    ("dataset_mixer", {"a": float("inf")}),
    ("dataset_mixer", ["a", 1]),
    ("dataset_mixer_list", ["a", True]),
    ("dataset_mixer_list", ["a", ["b"]]),
    ("dataset_mixer_list", {"a": 1}),
    ("eval_dataset", {"a": 1}),
    ("eval_dataset", ["a"]),
    ("dataset_transforms", [""]),
    ("dataset_transforms", [1]),
    ("report_to", ["neptune"]),
    ("report_to", "none,"),
    ("dataset_cache_mode", "none"),
    ("use_cache", "maybe"),
    ("beta", {}),
]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES, ids=str)
def test_a_wrong_type_is_refused(key, value):
    assert problem_keys(ExperimentConfig, **{**NEEDED, key: value}) == [key]


def test_all_problems_come_at_once_and_none_that_only_follows_from_another():
    given = {"num_epochs": "x", "max_train_steps": 5, "beta": -1.0, "optimizer": "adam"}
    keys = problem_keys(ExperimentConfig, **NEEDED, **given, eval_dataset=3, eval_steps=5)
    assert keys == ["num_epochs", "optimizer", "eval_dataset", "beta"]


def test_the_error_is_a_config_error_with_every_problem_in_its_text():
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*learning_rate is 'abc'.*beta is 0"):
        make(learning_rate="abc", beta=0)


@pytest.mark.parametrize("loss", list(DPOLossType))
def test_knobs_take_the_defaults_of_their_loss_and_others_stay_unset(loss):
    config = make(loss_type=loss.value)
    assert config.loss_type is loss
    assert config.knobs_of(loss) == LOSS_SPECS[loss].applying({})
    assert config.needs_reference == LOSS_SPECS[loss].needs_reference
    unread = KNOBS.keys() - config.knobs_of(loss).keys()
    assert all(getattr(config, name) is None for name in unread)
    assert unread.isdisjoint(config.to_dict())


def test_summed_losses_share_what_is_given_and_keep_their_own_defaults():
    config = make(loss_type=["dpo", "exo_pair", "simpo"])
    assert (config.beta, config.label_smoothing) == (None, None)
    assert (config.f_divergence, config.gamma_beta_ratio) == ("reverse_kl", 0.5)
    assert [config.knobs_of(loss)["beta"] for loss in config.loss_types] == [0.1, 0.5, 2.0]
    assert config.needs_reference
    config = make(loss_type=["orpo", "simpo"], beta=0.3)
    assert [config.knobs_of(loss)["beta"] for loss in config.loss_types] == [0.3, 0.3]
    assert not config.needs_reference
    assert make(loss_type=["wpo"]) == make(loss_type="wpo")


def test_what_is_left_unset_is_resolved():
    config = make()
    assert (config.num_epochs, config.max_train_steps) == (1.0, None)
    assert (config.warmup_ratio, config.warmup_steps) == (0.1, None)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (config.wanted_layout, config.eval_strategy) == ("auto", "never")
    assert (config.resolved_data_seed, config.eval_rows) == (42, 8)
    assert make(max_tokens_per_microbatch=512).eval_rows is None
    assert (
        make(per_device_eval_batch_size=4, max_tokens_per_microbatch=9, test_size=1).eval_rows == 4
    )
    assert make(max_train_steps=3).num_epochs is None
    assert make(warmup_steps=3).warmup_ratio is None
    assert make(lr_scheduler_type="constant").warmup_ratio is None
    assert make(optimizer="adafactor").adam_beta1 is None
    assert make(optimizer="muon").adam_beta1 == 0.9
    assert make(optimizer="muon").muon_momentum == 0.95
    assert make(optimizer="adamw_torchao_8bit").optimizer == "adamw_torch_8bit"
    assert make(optimizer="adamw_bnb_8bit").optimizer == "adamw_8bit"
    assert make(optimizer="sgd").adam_beta1 is None
    assert make(test_size=1).eval_strategy == "epoch"
    assert make(test_size=1, eval_steps=5).eval_strategy == "steps"
    assert make(concatenated_forward=False).wanted_layout == "separate"
    assert make(forward_layout="separate").wanted_layout == "separate"
    assert make(data_seed=0).resolved_data_seed == 0
    assert make(test_size=1, per_device_eval_batch_size=3).eval_rows == 3


def test_names_follow_from_experiment_and_seed():
    assert (make().exp_name, make().run_name) == ("preftune", "preftune__42")
    assert make(exp_name="a", seed=3).run_name == "a__3"
    assert make(exp_name="a", run_name="b").run_name == "b"


def test_sources_of_all_three_kinds():
    assert make().sources == (("pairs.jsonl", None),)
    mixed = {"b": 1, "a": 1.0, "c": 2.5}
    as_list = [part for pair in mixed.items() for part in pair]
    for given in (
        {"dataset_mixer": mixed},
        {"dataset_mixer_list": as_list},
        {"dataset_mixer_list": [str(part) for part in as_list]},
    ):
        assert repr(make(dataset_name=None, **given).sources) == repr(tuple(mixed.items()))
    assert make(dataset_name=None, dataset_mixer_list=as_list).dataset_mixer_list[1] == "1"


def test_evaluation_sources():
    assert make().eval_sources == {}
    assert make(eval_dataset="e").eval_sources == {"": "e"}
    assert make(eval_dataset={"x": "e", "y": "f"}).eval_sources == {"x": "e", "y": "f"}
    assert make(eval_dataset={"x": "e"}).eval_strategy == "epoch"


def test_a_single_name_is_a_list_of_one():
    assert make(report_to="tensorboard").report_to == ["tensorboard"]
    assert make(report_to="none").report_to is make(report_to=[]).report_to is None
    assert make(dataset_transforms="a, b").dataset_transforms == ["a, b"]
    assert make(dataset_transforms=("a", "b")).dataset_transforms == ["a", "b"]


@pytest.mark.parametrize("loss", list(DPOLossType))
@pytest.mark.parametrize("name", KNOBS)
def test_a_knob_of_another_loss_is_refused(loss, name):
    knob = KNOBS[name]
    value = knob.choices[0] if knob.choices else 0.25
    if name in LOSS_SPECS[loss].applying({}):
        assert getattr(make(loss_type=loss, **{name: value}), name) == value
    else:
        assert problem_keys(ExperimentConfig, **NEEDED, loss_type=loss, **{name: value}) == [name]


def test_spellings_of_one_value_are_equal():
    assert make(max_grad_norm=0) == make(max_grad_norm=None) == make(max_grad_norm=0.0)
    assert make(mixed_precision="no") == make(mixed_precision="fp32")
    assert make(learning_rate="5e-7") == make(learning_rate=5e-7)
    assert make(output_dir=Path("a/b")).output_dir == "a/b"
    assert isinstance(make(learning_rate=1).learning_rate, float)


def test_integers_and_fractions_stay_what_they_are():
    assert isinstance(make(test_size=1).test_size, int)
    assert isinstance(make(test_size="1").test_size, int)
    assert isinstance(make(test_size=0.5, eval_steps="0.5").eval_steps, float)


def test_global_batch_size_counts_all_devices():
    config = make(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert config.global_batch_size(shares=4) == 24


def test_a_changed_copy_is_checked_again():
    with pytest.raises(ConfigError, match="learning_rate"):
        replace(make(), learning_rate=-1.0)


def test_scoring_settings():
    assert ScoreConfig(**NEEDED).beta is None
    assert ScoreConfig(**NEEDED, reference_model_name_or_path="r").beta == 0.1
    assert ScoreConfig(**NEEDED, lists="a.jsonl").list_size == 100
    assert ScoreConfig(**NEEDED, forward_layout="separate").forward_layout == "separate"
    bad = {"beta": 0.1, "gradient_checkpointing": True, "disable_dropout": False, "output": "a.csv"}
    bad |= {"per_device_eval_batch_size": 0}
    assert sorted(problem_keys(ScoreConfig, **NEEDED, **bad)) == sorted(bad)
    bad = {"summary": "a.txt", "lists": "a.json", "list_size": 0, "other_models": []}
    assert sorted(problem_keys(ScoreConfig, **NEEDED, **bad)) == sorted(bad)
    assert problem_keys(ScoreConfig, **NEEDED, list_size=3) == ["list_size"]
    assert problem_keys(ScoreConfig, **NEEDED, other_models=["./a", "a/"]) == ["other_models"]
    assert problem_keys(ScoreConfig, **NEEDED, other_models=["m"]) == ["other_models"]
    itself = {"reference_model_name_or_path": "m"}
    assert problem_keys(ScoreConfig, **NEEDED, **itself) == list(itself)
    assert problem_keys(ScoreConfig, **NEEDED, beta=0.0, reference_model_name_or_path="r") == [
        "beta"
    ]
    assert problem_keys(ScoreConfig) == ["model_name_or_path", "dataset_name"]


@dataclass(kw_only=True)
class RewardModelConfig(ComposedConfig, ModelConfig, TrainingConfig, DatasetConfig):
    """Another experiment of the same sections."""

    num_labels: int = 1
    """Outputs of the head."""


def test_sections_compose_into_another_experiment():
    config = RewardModelConfig(**NEEDED, max_train_steps=3)
    assert (config.num_epochs, config.num_labels, config.warmup_ratio) == (None, 1, 0.1)
    assert next(iter(config.to_dict())) == "model_name_or_path"
    assert list(config.to_dict())[-1] == "num_labels"
    assert not hasattr(config, "loss_type")
    keys = problem_keys(RewardModelConfig, learning_rate=-1.0, num_labels="x", max_length=0)
    assert keys == [
        "num_labels",
        "model_name_or_path",
        "learning_rate",
        "dataset_name",
        "max_length",
    ]


@pytest.mark.parametrize("config", [ExperimentConfig, ScoreConfig])
def test_sections_share_no_name_by_which_one_would_hide_another(config):
    shared = {"__post_init__", "problems"}
    seen = {}
    for section in sections(config):
        own = [name for name in vars(section) if name not in shared and not name.startswith("__")]
        for name in [*own, *section.__annotations__]:
            assert seen.setdefault(name, section) is section, name


def test_a_section_alone_resolves_and_reports():
    section = TrainingConfig(warmup_ratio=2.0)
    assert section.num_epochs == 1.0
    assert [problem.key for problem in section.problems()] == ["warmup_ratio"]


def test_a_packed_layout_needs_a_kernel_with_a_packed_form():
    options = {"forward_layout": "shared_prefix", "attn_implementation": "eager"}
    for build in (make, lambda **more: ScoreConfig(**NEEDED, **more)):
        with pytest.raises(ConfigError, match="attn_implementation eager has no packed form"):
            build(**options)
        build(**options | {"forward_layout": "auto"})
        for attention in ("sdpa", "flash_attention_2", "varlen", "flex"):
            build(**options | {"attn_implementation": attention})


@pytest.mark.parametrize("attention", ["varlen", "flex"])
def test_padded_pairs_have_no_kernel_of_packed_rows(attention):
    for options in ({"forward_layout": "concatenated"}, {"concatenated_forward": False}):
        with pytest.raises(ConfigError, match="is a kernel of packed rows, and the layout is"):
            make(**options, attn_implementation=attention)
        make(**options, attn_implementation="flash_attention_2")
