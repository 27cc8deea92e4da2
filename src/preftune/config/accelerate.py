"""What `accelerate launch` hands on of its configuration, as options of preftune.

It puts its config file and its options into variables of each process. Its own defaults stand
there, too: what has such a value counts as not chosen. preftune drives the engines itself, so what
it cannot honour is refused by name.
"""

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
"""FSDP 1 has them by name, and by number from 1."""
_FAMILIES = ("FSDP_", "ACCELERATE_DEEPSPEED_", "PARALLELISM_CONFIG_")
_SINGLE = (
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_MIXED_PRECISION",
)
_LEFT_TO_DEEPSPEED = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "ignore_unused_parameters",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)
"""Of zero_optimization: how fast, not what. preftune leaves them at DeepSpeed's defaults."""
_WITHOUT_EFFECT = frozenset(
    {
        "dump_state",
        "steps_per_print",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
_OWN = {
    "optimizer": "remove it: preftune's optimizer and its learning_rate are options of its own",
    "scheduler": "remove it, and give lr_scheduler_type, warmup_ratio or warmup_steps",
    "train_batch_size": "set it to auto, and give total_batch_size",
}
"""Sections of a DeepSpeed config that options of preftune stand for."""


@dataclass(frozen=True)
class Taken:
    """An option that Accelerate's configuration sets."""

    key: str
    """Of preftune."""
    value: Any
    place: str
    """The variable, or the key of DeepSpeed's file, with what it holds."""


@dataclass
class FromAccelerate:
    """What was found in the variables of a process."""

    taken: list[Taken] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Keys of DeepSpeed's file that change no number and are not taken over."""

    def __str__(self) -> str:
        """One line for people; empty where nothing was taken."""
        if not self.taken:
            return ""
        values = {item.key: item.value for item in self.taken}
        said = ", ".join(
            f"{key} {str(value).lower() if isinstance(value, bool) else value}"
            for key, value in values.items()
        )
        left = f"; left at DeepSpeed's defaults: {', '.join(self.left)}" if self.left else ""
        return f"from Accelerate's configuration: {said}{left}"

    def take(self, key: str, value: Any, place: str) -> None:
        """Note an option."""
        for other in self.taken:
            if other.key == key and other.value != value:
                self.problems.append(f"{place}, and {other.place}; keep one of them")
        self.taken.append(Taken(key, value, place))

    def refuse(self, place: str, remedy: str) -> None:
        """Note what cannot be honoured."""
        self.problems.append(f"{place} (from Accelerate's configuration); {remedy}")

    def take_number(self, key: str, text: Any, place: str, kind: type[int] | type[float]) -> None:
        """Note a number, unless it is left to preftune."""
        if str(text).lower() in ("auto", "none"):
            return
        try:
            self.take(key, kind(str(text)), place)
        except ValueError:
            self.refuse(place, "it must be a number or auto")

    def take_offload(self, key: str, device: Any, place: str) -> None:
        """Note where DeepSpeed keeps something."""
        if device == "cpu":
            self.take(key, True, place)
        elif device not in (None, "none"):
            self.refuse(place, f"preftune offloads to the host's memory only: {key} with cpu")


def from_accelerate(environ: Mapping[str, str]) -> FromAccelerate:
    """Options of preftune that stand for what Accelerate's configuration chooses.

    Args:
        environ: the variables of the process. A DeepSpeed config file that they name is read.
    """
    found = FromAccelerate()
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":  # which it also says where nobody chose
        found.take("mixed_precision", precision, _said(environ, "ACCELERATE_MIXED_PRECISION"))
    if _is_on(environ, "ACCELERATE_USE_MEGATRON_LM"):
        place = _said(environ, "ACCELERATE_USE_MEGATRON_LM")
        found.refuse(place, "preftune does not use Megatron-LM: take FSDP or DeepSpeed")
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        place = _said(environ, "ACCELERATE_DYNAMO_BACKEND")
        found.refuse(place, "preftune does not compile models: set dynamo_backend to no")
    if _is_on(environ, "ACCELERATE_USE_FSDP"):
        _fsdp(environ, found)
    if _is_on(environ, "ACCELERATE_USE_DEEPSPEED"):
        _deepspeed(environ, found)
    return found


def take_from_accelerate(environ: MutableMapping[str, str]) -> FromAccelerate:
    """As `from_accelerate`; then drop the variables, so that nobody else acts on them.

    Accelerate would set up its own engines, and transformers load weights on rank 0 only.
    """
    found = from_accelerate(environ)
    for name in list(environ):
        if name in _SINGLE or name.startswith(_FAMILIES):
            del environ[name]
    return found


def _said(environ: Mapping[str, str], name: str) -> str:
    return f"{name} is {environ[name]}"


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() in ("1", "true", "yes", "y", "on", "t")


# ---------------------------------------------------------------- FSDP


def _fsdp(environ: Mapping[str, str], found: FromAccelerate) -> None:
    if environ.get("FSDP_VERSION", "1") == "1":
        _fsdp_strategy(environ, found)
    elif not _is_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        found.take("fsdp", "full_shard", _said(environ, "ACCELERATE_USE_FSDP"))
    else:
        _parallelism(environ, found)
    name = "FSDP_RESHARD_AFTER_FORWARD"
    if environ.get(name, "true").lower() == "false":
        found.take("fsdp_reshard_after_forward", False, _said(environ, name))
    for name, key in (
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "gradient_checkpointing"),
    ):
        if _is_on(environ, name):
            found.take(key, True, _said(environ, name))
    name = "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"
    if _is_on(environ, name):
        found.refuse(_said(environ, name), "preftune recomputes activations: set it to false")
    name = "FSDP_IGNORED_MODULES"
    if environ.get(name, "None") not in ("", "None"):
        found.refuse(_said(environ, name), "preftune cuts the whole model: leave it out")


def _fsdp_strategy(environ: Mapping[str, str], found: FromAccelerate) -> None:
    """Of FSDP 1, whose words preftune's FSDP2 takes where it has the same."""
    name = "FSDP_SHARDING_STRATEGY"
    newer = environ.get("FSDP_RESHARD_AFTER_FORWARD", "").upper()
    if newer in _STRATEGIES and newer != _STRATEGIES[0]:
        name = "FSDP_RESHARD_AFTER_FORWARD"
    strategy = environ.get(name, _STRATEGIES[0]).upper()
    if strategy.isdigit() and 1 <= int(strategy) <= len(_STRATEGIES):
        strategy = _STRATEGIES[int(strategy) - 1]
    place = f"{name} is {strategy}" if name in environ else _said(environ, "ACCELERATE_USE_FSDP")
    match strategy:
        case "FULL_SHARD":
            found.take("fsdp", "full_shard", place)
        case "HYBRID_SHARD":
            found.take("fsdp", "hybrid_shard", place)
        case "SHARD_GRAD_OP":
            remedy = "that is ZeRO-2: give zero_stage 2, or fsdp full_shard with "
            found.refuse(place, f"{remedy}fsdp_reshard_after_forward false")
        case "NO_SHARD":
            found.refuse(place, "that is DDP: leave FSDP out of it")
        case _:
            found.refuse(place, "preftune has FULL_SHARD and HYBRID_SHARD")


def _parallelism(environ: Mapping[str, str], found: FromAccelerate) -> None:
    """Of FSDP2 with a parallelism_config: sizes of groups."""
    prefix = "PARALLELISM_CONFIG_"
    for axis, remedy in (
        ("TP_SIZE", "preftune does not cut layers: set it to 1"),
        ("CP_SIZE", "set it to 1, and give sequence_parallel_size"),
        ("SP_SIZE", "set it to 1, and give sequence_parallel_size"),
    ):
        if environ.get(prefix + axis, "1") != "1":
            found.refuse(_said(environ, prefix + axis), remedy)
    replicas, shards = (
        environ.get(prefix + axis, "1") for axis in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE")
    )
    place = f"{prefix}DP_REPLICATE_SIZE is {replicas} and {prefix}DP_SHARD_SIZE {shards}"
    world_size = environ.get("WORLD_SIZE")  # not there before processes start
    if not (replicas.isdigit() and shards.isdigit()):
        found.refuse(place, "they must be whole numbers")
    elif world_size not in (None, str(int(replicas) * int(shards))):
        found.refuse(place, f"that is for another number than the {world_size} processes here")
    elif int(replicas) == 1:
        found.take("fsdp", "full_shard", place)
    else:
        found.take("fsdp", "hybrid_shard", place)
        found.take("fsdp_shard_size", int(shards), place)


# ---------------------------------------------------------------- DeepSpeed


def _deepspeed(environ: Mapping[str, str], found: FromAccelerate) -> None:
    prefix = "ACCELERATE_DEEPSPEED_"
    file = environ.get(f"{prefix}CONFIG_FILE", "none")
    stage = f"{prefix}ZERO_STAGE"
    if stage in environ:
        found.take_number("zero_stage", environ[stage], _said(environ, stage), int)
    elif file == "none":  # Accelerate's default
        found.take("zero_stage", 2, _said(environ, "ACCELERATE_USE_DEEPSPEED"))
    for what in ("optimizer", "param"):
        name = f"{prefix}OFFLOAD_{what.upper()}_DEVICE"
        if name in environ:
            found.take_offload(f"offload_{what}", environ[name], _said(environ, name))
    for name, key, kind in (
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", int),
        ("ACCELERATE_GRADIENT_CLIPPING", "max_grad_norm", float),
    ):
        if name in environ:
            found.take_number(key, environ[name], _said(environ, name), kind)
    name = f"{prefix}MOE_LAYER_CLS_NAMES"
    if name in environ:
        found.refuse(_said(environ, name), "preftune does not tell DeepSpeed: leave it out")
    if file != "none":
        _deepspeed_file(file, found)


def _deepspeed_file(file: str, found: FromAccelerate) -> None:
    try:
        document = json.loads(Path(file).expanduser().read_text("utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        place = f"ACCELERATE_DEEPSPEED_CONFIG_FILE is {file}"
        found.refuse(place, f"it cannot be read as JSON ({error})")
        return

    zero = document.pop("zero_optimization", {})
    for key, value in document.items():
        _deepspeed_entry(key, value, f"{key} of {file} is {json.dumps(value)}", found)
    if isinstance(zero, dict):
        _zero_section(zero, file, found)
    else:
        place = f"zero_optimization of {file} is {json.dumps(zero)}"
        found.refuse(place, "it must be an object")


def _deepspeed_entry(key: str, value: Any, place: str, found: FromAccelerate) -> None:
    match key:
        case "gradient_accumulation_steps":
            found.take_number(key, value, place, int)
        case "gradient_clipping":
            found.take_number("max_grad_norm", value, place, float)
        case "train_micro_batch_size_per_gpu":
            found.take_number("per_device_train_batch_size", value, place, int)
        case "bf16" | "fp16":
            if isinstance(value, dict) and value.get("enabled") is True:
                found.take("mixed_precision", key, place)
        case _ if value in ("auto", False) or key in _WITHOUT_EFFECT:
            pass
        case _:
            found.refuse(place, _OWN.get(key, "preftune does not read it: leave it out"))


def _zero_section(zero: Mapping[str, Any], file: str, found: FromAccelerate) -> None:
    for key, value in {"stage": 0, **zero}.items():
        where = f"zero_optimization.{key} of {file} is {json.dumps(value)}"
        match key:
            case "stage" if value == "auto":
                found.refuse(where, "give 0, 1, 2 or 3")
            case "stage":
                found.take_number("zero_stage", value, where, int)
            case "offload_optimizer" | "offload_param":
                device = value.get("device", "none") if isinstance(value, dict) else value
                found.take_offload(key, device, where)
            case "zero_hpz_partition_size":
                found.take_number(key, value, where, int)
            case _ if key in _LEFT_TO_DEEPSPEED:
                if value != "auto":
                    found.left.append(key)
            case _ if value not in ("auto", False):
                found.refuse(where, "preftune does not read it: leave it out")
