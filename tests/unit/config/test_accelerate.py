"""Accelerate's configuration as options of preftune: what is taken, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune.config.accelerate import from_accelerate, take_from_accelerate
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.errors import ConfigError

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
PARALLELISM = FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
SIZES = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


def taken(environ: dict[str, str]) -> dict[str, Any]:
    found = from_accelerate(environ)
    assert found.problems == []
    return {item.key: item.value for item in found.taken}


def refused(environ: dict[str, str]) -> str:
    (problem,) = from_accelerate(environ).problems
    return problem


def launcher_environment(path: Path, document: dict[str, Any], monkeypatch) -> dict[str, str]:
    """The variables that `accelerate launch --config_file` itself hands on."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    machine = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
    machine |= {"machine_rank": 0, "main_process_port": 0, "use_cpu": False}
    path.write_text(yaml.safe_dump(machine | document))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--config_file", str(path), "--module", "preftune"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize(
    ("document", "options"),
    [
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "no"}, {}),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            {"fsdp": "full_shard"},
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {
                    "fsdp_version": 2,
                    "fsdp_reshard_after_forward": False,
                    "fsdp_offload_params": True,
                    "fsdp_activation_checkpointing": True,
                    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
                },
            },
            {
                "fsdp": "full_shard",
                "fsdp_reshard_after_forward": False,
                "fsdp_offload_params": True,
                "gradient_checkpointing": True,
            },
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 1, "fsdp_sharding_strategy": "HYBRID_SHARD"},
            },
            {"fsdp": "hybrid_shard"},
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "deepspeed_config": {
                    "zero_stage": 3,
                    "offload_optimizer_device": "cpu",
                    "offload_param_device": "none",
                    "gradient_accumulation_steps": 4,
                    "gradient_clipping": 0.5,
                    "zero3_init_flag": True,
                },
            },
            {
                "zero_stage": 3,
                "offload_optimizer": True,
                "gradient_accumulation_steps": 4,
                "max_grad_norm": 0.5,
            },
        ),
    ],
    ids=["ddp", "bf16", "fsdp2", "fsdp2 with all", "fsdp1 hybrid", "deepspeed"],
)
def test_what_accelerate_launch_hands_on_is_taken(tmp_path, monkeypatch, document, options):
    pytest.importorskip("deepspeed", reason="Accelerate looks whether it is there")
    environ = launcher_environment(tmp_path / "config.yaml", document, monkeypatch)
    assert taken(environ) == options


def test_the_variables_are_gone_once_they_are_taken():
    environ = {"HOME": "/root", "ACCELERATE_USE_CPU": "true", "FSDP_OFFLOAD_PARAMS": "false"}
    environ |= ZERO | FSDP2 | {"ACCELERATE_MIXED_PRECISION": "no"}
    take_from_accelerate(environ)
    assert environ == {"HOME": "/root", "ACCELERATE_USE_CPU": "true"}


def test_one_line_says_what_is_taken():
    environ = ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
    assert str(from_accelerate(environ)) == (
        "from Accelerate's configuration: zero_stage 3, offload_param true"
    )
    assert str(from_accelerate({})) == ""


def test_accelerates_own_stage_where_none_is_given():
    assert taken({"ACCELERATE_USE_DEEPSPEED": "true"}) == {"zero_stage": 2}


def test_strategies_of_fsdp_1_by_number_and_by_their_newer_key():
    assert taken(FSDP1 | {"FSDP_SHARDING_STRATEGY": "4"}) == {"fsdp": "hybrid_shard"}
    assert "FSDP_RESHARD_AFTER_FORWARD is SHARD_GRAD_OP" in refused(
        FSDP1
        | {"FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"}
    )


def test_groups_of_fsdp2():
    sizes = dict(zip(SIZES, "23", strict=True))
    expected = {"fsdp": "hybrid_shard", "fsdp_shard_size": 3}
    assert taken(PARALLELISM | sizes | {"WORLD_SIZE": "6"}) == expected
    assert taken(PARALLELISM | sizes) == expected  # before processes start
    assert refused(PARALLELISM | sizes | {"WORLD_SIZE": "4"}) == (
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE is 2 and PARALLELISM_CONFIG_DP_SHARD_SIZE 3 (from "
        "Accelerate's configuration); that is for another number than the 4 processes here"
    )
    whole = dict(zip(SIZES, "14", strict=True))
    assert taken(PARALLELISM | whole | {"WORLD_SIZE": "4"}) == {"fsdp": "full_shard"}


@pytest.mark.parametrize(
    ("environ", "named", "remedy"),
    [
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "SHARD_GRAD_OP", "zero_stage 2"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, "NO_SHARD", "that is DDP"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"}, "ZERO2", "HYBRID_SHARD"),
        (FSDP1 | {"FSDP_SHARDING_STRATEGY": "9"}, "STRATEGY is 9", "FULL_SHARD"),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "head"}, "FSDP_IGNORED_MODULES is head", "leave it out"),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            "ACTIVATION_CHECKPOINTING_OFFLOAD is true",
            "set it to false",
        ),
        (
            PARALLELISM | {"PARALLELISM_CONFIG_CP_SIZE": "2"},
            "PARALLELISM_CONFIG_CP_SIZE is 2",
            "give sequence_parallel_size",
        ),
        (PARALLELISM | dict(zip(SIZES, "2x", strict=True)), "is 2 and", "whole numbers"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE is nvme",
            "offload_param with cpu",
        ),
        (
            ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "many"},
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is many",
            "a number or auto",
        ),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Experts"},
            "MOE_LAYER_CLS_NAMES is Experts",
            "leave it out",
        ),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere.json"},
            "ACCELERATE_DEEPSPEED_CONFIG_FILE is /nowhere.json",
            "cannot be read as JSON",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM", "take FSDP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "INDUCTOR", "dynamo_backend to no"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(environ, named, remedy):
    said = refused(environ)
    before, _, after = said.partition(" (from Accelerate's configuration); ")
    assert named in before
    assert remedy in after


def with_file(tmp_path: Path, document: Any) -> dict[str, str]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(document))
    environ = {"ACCELERATE_USE_DEEPSPEED": "true"}
    return environ | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def test_the_file_of_deepspeed(tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    zero |= {"zero_hpz_partition_size": 8, "overlap_comm": True, "reduce_bucket_size": "auto"}
    document = {
        "zero_optimization": zero | {"offload_optimizer": {"device": "none"}},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"},
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
    }
    environ = with_file(tmp_path, document)
    assert taken(environ) == {
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.5,
        "mixed_precision": "bf16",
        "zero_stage": 3,
        "offload_param": True,
        "zero_hpz_partition_size": 8,
    }
    assert str(from_accelerate(environ)).endswith("; left at DeepSpeed's defaults: overlap_comm")
    assert taken(with_file(tmp_path, {"steps_per_print": 1})) == {"zero_stage": 0}


@pytest.mark.parametrize(
    ("document", "named", "remedy"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer of", "options of its own"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler of", "lr_scheduler_type"),
        ({"train_batch_size": 64}, "train_batch_size of", "total_batch_size"),
        ({"sparse_attention": {}}, "sparse_attention of", "leave it out"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "quantized", "leave"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage of", "0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer of",
            "host's memory only",
        ),
        ({"zero_optimization": 3}, "zero_optimization of", "it must be an object"),
        ([], "ds.json", "it holds no object"),
    ],
)
def test_what_the_file_of_deepspeed_must_not_say(tmp_path, document, named, remedy):
    said = refused(with_file(tmp_path, document))
    assert named in said
    assert remedy in said


def test_a_file_that_contradicts_the_variables(tmp_path):
    environ = with_file(tmp_path, {"zero_optimization": {"stage": 2}}) | ZERO
    assert refused(environ) == (
        f"zero_optimization.stage of {tmp_path}/ds.json is 2, and "
        "ACCELERATE_DEEPSPEED_ZERO_STAGE is 3; keep one of them"
    )


def parsed(environ: dict[str, str], *words: str) -> ExperimentConfig:
    return parse_config(ExperimentConfig, [*words, *NEEDED], launcher=from_accelerate(environ))


def test_options_come_from_it_and_may_say_the_same():
    config = parsed(ZERO | {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision", "auto")
    assert (config.zero_stage, config.mixed_precision) == (3, "bf16")
    assert parsed(ZERO, "--zero_stage", "3").zero_stage == 3
    assert parsed(FSDP2, "--fsdp", "full_shard").fsdp == "full_shard"


@pytest.mark.parametrize(
    ("environ", "words", "said"),
    [
        (
            ZERO,
            ["--zero_stage", "2"],
            "command line: --zero_stage is 2, and ACCELERATE_DEEPSPEED_ZERO_STAGE is 3 in "
            "Accelerate's configuration, which stands for 3; keep one",
        ),
        (
            FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            ["--gradient_checkpointing", "false"],
            "command line: --gradient_checkpointing is false, and FSDP_ACTIVATION_CHECKPOINTING is "
            "true in Accelerate's configuration, which stands for true; keep one",
        ),
        (
            ZERO | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
            ["--gradient_accumulation_steps", "8"],
            "command line: --gradient_accumulation_steps is 8, and "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 1 in Accelerate's configuration, which "
            "stands for 1; keep one",
        ),
        (
            ZERO,
            ["--fsdp", "full_shard"],
            "ACCELERATE_DEEPSPEED_ZERO_STAGE is 3: zero_stage is 3; fsdp is 'full_shard' too, and "
            "they exclude each other: leave one out",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            [],
            "ACCELERATE_MIXED_PRECISION is fp8: mixed_precision is 'fp8'; ",
        ),
    ],
)
def test_a_contradiction_names_both(environ, words, said):
    with pytest.raises(ConfigError) as error:
        parsed(environ, *words)
    (problem,) = error.value.problems
    assert problem.startswith(said)
