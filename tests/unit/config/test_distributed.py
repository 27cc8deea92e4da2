"""Contradictions between options of engines, by name."""

import pytest

from preftune import ExperimentConfig
from preftune.config.distributed import DistributedConfig
from preftune.config.problem import InvalidConfig
from preftune.distributed.runtime import Runtime
from preftune.errors import ConfigError
from preftune.recipes import preflight

REFUSED = [
    ({"zero_stage": 5}, "zero_stage is 5; it must be 0, 1, 2 or 3"),
    ({"zero_stage": -1}, "zero_stage is -1; it must be 0, 1, 2 or 3"),
    ({"offload_optimizer": True}, "offload_optimizer is true; it needs zero_stage 1 or above"),
    ({"zero_stage": 0, "offload_optimizer": True}, "it needs zero_stage 1 or above"),
    ({"zero_stage": 2, "offload_param": True}, "offload_param is true; it needs zero_stage 3"),
    ({"zero_stage": 3, "fsdp": "full_shard"}, "fsdp is 'full_shard' too, and they exclude each"),
    ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size is 2; it needs zero_stage 3"),
    ({"fsdp": "full_shard", "fsdp_shard_size": 2}, "only fsdp hybrid_shard reads it"),
    ({"fsdp": "hybrid_shard", "fsdp_shard_size": 0}, "fsdp_shard_size is 0; it must be 1 or more"),
    ({"fsdp_offload_params": True}, "fsdp is 'no', so nothing reads it"),
    ({"fsdp_reshard_after_forward": True}, "fsdp is 'no', so nothing reads it"),
    ({"zero_stage": 1, "sync_reference": True}, "the live reference is a whole copy"),
    ({"fsdp": "full_shard", "optimizer": "sgd"}, "it cannot update weights that are cut"),
    ({"fsdp": "full_shard", "optimizer": "muon"}, "it cannot update weights that are cut"),
    ({"fsdp": "full_shard", "optimizer": "adafactor"}, "it cannot update weights that are cut"),
    ({"fsdp": "full_shard", "optimizer": "adamw_8bit"}, "take adamw, adamw_torch_8bit or"),
    ({"zero_stage": 0, "optimizer": "adamw_8bit"}, "across weights: take adamw or sgd"),
    ({"zero_stage": 3, "optimizer": "adamw_torch_8bit"}, "across weights: take adamw or sgd"),
    (
        {"zero_stage": 1, "stochastic_rounding": True, "dtype": "bfloat16"},
        "DeepSpeed updates float32 copies",
    ),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_contradictions_are_refused(options, text):
    with pytest.raises(InvalidConfig) as error:
        ExperimentConfig(model_name_or_path="m", dataset_name="pairs.jsonl", **options)
    assert text in str(error.value)


def test_deepspeed_that_is_not_installed_is_told_before_weights_load(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="zero_stage is 1, and the package deepspeed is not"):
        preflight.check_engine(DistributedConfig(zero_stage=1))
    preflight.check_engine(DistributedConfig(fsdp="full_shard"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"fsdp": "hybrid_shard", "fsdp_shard_size": 2},
            "fsdp_shard_size is 2, and it must divide",
        ),
        (
            {"zero_stage": 3, "zero_hpz_partition_size": 4},
            "zero_hpz_partition_size is 4, and it must",
        ),
    ],
)
def test_groups_that_the_processes_do_not_fill_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        Runtime("fp32", seed=0).check_groups(DistributedConfig(**options))


def test_no_as_yaml_reads_it():
    config = ExperimentConfig(model_name_or_path="m", dataset_name="p.jsonl", fsdp="no")
    assert not config.shards
    assert config.engine == "DDP"


@pytest.mark.parametrize(
    ("options", "name", "shards", "together"),
    [
        ({}, "DDP", False, False),
        ({"zero_stage": 0}, "ZeRO-0", False, False),
        ({"zero_stage": 2}, "ZeRO-2", True, False),
        ({"zero_stage": 3}, "ZeRO-3", True, True),
        ({"fsdp": "hybrid_shard"}, "FSDP2 hybrid_shard", True, True),
    ],
)
def test_what_an_engine_shares_out(options, name, shards, together):
    config = DistributedConfig(**options)
    assert (config.engine, config.shards, config.shards_weights) == (name, shards, together)
