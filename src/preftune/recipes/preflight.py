"""What can be found wrong before any data is read or weight loaded: folders, device, model files.

`train` and `check` both begin here.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from transformers import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.distributed import DistributedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import ModelConfig
from preftune.config.optimizers import OF_BITSANDBYTES
from preftune.config.paths import cache_root
from preftune.config.training import MixedPrecision, TrainingConfig
from preftune.data.template_files import template_text
from preftune.distributed.ranks import Ranks
from preftune.distributed.runtime import multiplies_bf16, multiplies_fp16, resolve_precision
from preftune.errors import ConfigError, Findings, absent_package
from preftune.evaluation.jobs.checks import check_jobs
from preftune.model.adapters import check_adapter, commit_of, peft_config, skeleton
from preftune.model.attention_shards import check_heads
from preftune.model.load import load_model_config, model_commit
from preftune.model.load_balancing import experts_a_token
from preftune.model.quantization import PACKAGE, names_to_quantize
from preftune.recipes.pairs import prepare_tokenizer
from preftune.recipes.publish import look_at_hub
from preftune.recipes.reference import pin_reference
from preftune.tracking.tracker import check_trackers
from preftune.training.run_folder import RunStart, check_writable, plan_start


def check_setup(
    config: ExperimentConfig, ranks: Ranks
) -> tuple[RunStart, ExperimentConfig, PreTrainedTokenizerBase | None]:
    """Look at folders, device, model files and tokenizer.

    Args:
        config: of the run.
        ranks: all of them call this; rank 0 looks at the output folder for all.

    Returns:
        How the run begins, the config with the model's commit as its revision, and the tokenizer
        with its chat template; None of a finished run, which needs none.

    Raises:
        PreftuneError: with everything found wrong; on every rank.
    """
    findings = Findings()
    start = None
    with findings:
        start = ranks.decide(lambda: plan_start(config))
    with findings:
        ranks.decide(lambda: look_at_hub(config))
    if start is not None and start.kind == "finished":
        findings.raise_all()
        return start, config, None

    if config.eval_jobs:
        with findings:
            ranks.decide(lambda: check_jobs(config, ask_harness=True))

    def look() -> tuple[ExperimentConfig, PreTrainedTokenizerBase]:
        look_at_cache(config, findings)
        found = look_at_model(config, findings, start, is_main=ranks.is_main)
        findings.raise_all()
        assert found is not None  # or there was a finding
        return found

    found = ranks.together(look)
    assert start is not None  # or there was a finding
    return start, *found


def look_at_output(config: ExperimentConfig, findings: Findings) -> RunStart | None:
    """Plan how the run begins in `output_dir`."""
    with findings:
        return plan_start(config)
    return None


def look_at_cache(config: ExperimentConfig, findings: Findings) -> bool:
    """Whether the cache can be written, as far as that can be told."""
    with findings:
        check_writable("cache_dir", cache_root(config.cache_dir))
        return True
    return False


def look_at_model(
    config: ExperimentConfig, findings: Findings, start: RunStart | None, *, is_main: bool = True
) -> tuple[ExperimentConfig, PreTrainedTokenizerBase] | None:
    """See that device and packages can run the model, and load the tokenizer; no weights are read.

    Args:
        config: of the run.
        findings: takes what is wrong.
        start: how the run begins, if that is known.
        is_main: whether this process would open trackers.

    Returns:
        The config with the model's commit as its revision, and the tokenizer.
    """
    with findings:
        check_device(config, config.mixed_precision)
    with findings:
        check_engine(config)
    with findings:
        check_optimizer(config)
    with findings:
        check_quantization(config)
    with findings:
        check_trackers(config.report_to, is_main=is_main)
    with findings:
        # A branch may move while the run is away: what it stood for at the start stays.
        known = None if start is None else start.model_commit
        pinned = replace(config, model_revision=known or model_commit(config))
        if config.use_lora:
            known = None if start is None else start.adapter_commit
            pinned.adapter_revision = known or commit_of(pinned)
            check_lora(pinned)
        check_routers(config, load_model_config(pinned))
        check_sequence(config, load_model_config(pinned))
        tokenizer = prepare_tokenizer(pinned)
        return pin_reference(pinned, tokenizer, start and start.reference_commit), tokenizer
    if config.chat_template is not None:
        with findings:  # it may be wrong, too
            template_text(config.chat_template)
    return None


def check_lora(config: ExperimentConfig) -> None:
    """Refuse an adapter that the model, or the run, cannot have.

    Args:
        config: of the run, with commits as revisions.

    Raises:
        ConfigError: it names layers that the model has not, or drops inputs where it must not.
        ModelError: the adapter to go on with cannot be read, or is another model's.
    """
    trusted = config.trust_remote_code
    model = skeleton(load_model_config(config), trust_remote_code=trusted)
    check_adapter(config, model, names_to_quantize(model) if config.is_quantized else frozenset())
    dropout, size = peft_config(config).lora_dropout, config.sequence_parallel_size
    if dropout and size > 1:
        raise ConfigError(
            f"sequence_parallel_size is {size}, and the adapter of adapter_name_or_path has a "
            f"dropout of {dropout}: processes draw the same random numbers, each for its part of a "
            "row; set --lora_dropout 0"
        )


def check_routers(config: ExperimentConfig, model_config: PreTrainedConfig) -> None:
    """Refuse to spread tokens over experts that the model has not.

    Args:
        config: of the run.
        model_config: of the model's architecture.

    Raises:
        ConfigError: no routers are known.
    """
    if config.load_balancing_weight > 0 and experts_a_token(model_config) is None:
        raise ConfigError(
            f"load_balancing_weight is {config.load_balancing_weight}, and "
            f"{config.model_name_or_path} (a {model_config.model_type}) has no routers to experts "
            "that transformers would show; leave it out"
        )


def check_sequence(config: ExperimentConfig, model_config: PreTrainedConfig) -> None:
    """Refuse to share rows out to more processes than heads of attention go around.

    Args:
        config: of the run.
        model_config: of the model's architecture.

    Raises:
        ModelError: they do not.
    """
    num_heads = getattr(model_config.get_text_config(), "num_attention_heads", None)
    if config.sequence_parallel_size > 1 and isinstance(num_heads, int):
        check_heads(num_heads, config.sequence_parallel_size)


def check_engine(config: DistributedConfig) -> None:
    """Refuse an engine whose package is absent.

    Args:
        config: which engine.

    Raises:
        ConfigError: DeepSpeed is asked for, and not installed.
    """
    if config.zero_stage is not None and find_spec("deepspeed") is None:
        asked = f"zero_stage is {config.zero_stage}"
        raise absent_package(asked, "deepspeed", "deepspeed", "take --fsdp full_shard")


def check_optimizer(config: TrainingConfig) -> None:
    """Refuse an optimizer that this machine has not.

    Args:
        config: which.

    Raises:
        ConfigError: its package is absent, or it needs a GPU.
    """
    name = config.optimizer
    if name not in OF_BITSANDBYTES:
        return
    if name == "paged_adamw_8bit" and not torch.cuda.is_available():
        raise ConfigError(
            f"optimizer is {name!r}, which pages memory between a GPU and the host, and torch sees "
            "no GPU here; set --optimizer adamw_8bit"
        )
    if find_spec(PACKAGE) is None:
        asked, otherwise = f"optimizer is {name!r}", "set --optimizer adamw_torch_8bit"
        raise absent_package(asked, PACKAGE, "quant", otherwise)


def check_quantization(model: ModelConfig) -> None:
    """Refuse quantised weights where what makes them is absent.

    Args:
        model: how it shall be loaded.

    Raises:
        ConfigError: bitsandbytes is needed, and not installed.
    """
    if model.is_quantized and find_spec(PACKAGE) is None:
        key = model.quantization_key
        raise absent_package(f"{key} is true", PACKAGE, "quant", f"leave {key} out")


def check_device(model: ModelConfig, mixed_precision: MixedPrecision) -> None:
    """Refuse what the device cannot do.

    Args:
        model: how weights and attention shall run.
        mixed_precision: how products shall be computed.

    Raises:
        ConfigError: with every such setting.
    """
    problems = []
    has_cuda = torch.cuda.is_available()
    lacks = _attention_lacks(model, mixed_precision)
    if lacks is not None:
        problems.append(
            f"attn_implementation is {model.attn_implementation!r}, which {lacks}; "
            "set --attn_implementation auto"
        )
    if model.activation_offload and not has_cuda:
        problems.append(
            "activation_offload is true, which moves activations from a GPU to the host, and torch "
            "sees no GPU here; leave it out"
        )
    if has_cuda:
        problems += [
            f"{key} is {value!r}, and this GPU has no hardware for it; set --{key} {other}"
            for key, value, other in _unsupported(model, mixed_precision)
        ]
    if problems:
        raise ConfigError(problems)


def _attention_lacks(model: ModelConfig, mixed_precision: MixedPrecision) -> str | None:
    """What the attention kernel that is asked for by name lacks here."""
    name = model.attn_implementation
    if name not in ("flash_attention_2", "varlen", "flex"):
        return None
    if not torch.cuda.is_available():
        return "runs on CUDA GPUs, and torch sees none here"
    if name == "flex":
        return None
    # With the package kernels, transformers fetches the kernel from the Hub.
    packages = ("flash_attn", "kernels")
    if name == "flash_attention_2" and not any(find_spec(package) for package in packages):
        return "needs the package flash-attn, and it is not installed"
    if model.dtype == "float32" and resolve_precision(mixed_precision) == "fp32":
        return "computes in bf16 and fp16, and products are fp32 here (mixed_precision)"
    return None


def slow_settings(model: ModelConfig, mixed_precision: MixedPrecision) -> list[str]:
    """What the device can do, but slowly: a sentence a setting, for people."""
    if torch.cuda.is_available():
        return []
    return [
        f"{key} is {value!r}, which this CPU computes in software, far slower than fp32; "
        f"--{key} {other} is faster"
        for key, value, other in _unsupported(model, mixed_precision)
    ]


def _unsupported(model: ModelConfig, mixed_precision: MixedPrecision) -> list[tuple[str, str, str]]:
    """The settings that ask for a type that the hardware lacks: key, value, what works."""
    lacked = set()
    if not multiplies_bf16():
        lacked |= {"bfloat16", "bf16"}
    if not multiplies_fp16():
        lacked.add("fp16")
    products = "fp16" if multiplies_fp16() else "fp32"
    settings = [("dtype", model.dtype, "float32"), ("mixed_precision", mixed_precision, products)]
    return [setting for setting in settings if setting[1] in lacked]
