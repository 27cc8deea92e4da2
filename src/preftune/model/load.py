"""Load a causal LM and its tokenizer from a hub id, a folder or a GGUF file; save them again."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from preftune.config.export import SaveDtype
from preftune.config.model import ModelConfig
from preftune.errors import ModelError
from preftune.model.activations import recompute
from preftune.model.forward import PolicyModel
from preftune.model.probe import head_is_plain
from preftune.model.quantization import (
    loading_options,
    make_right,
    num_weights,
    refuse_quantized_files,
)

if TYPE_CHECKING:
    from preftune.model.adapters import Adapter

# Its bars for reading a local file would garble the one live view of a run.
transformers_logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
PICKLED_FILES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass
class LoadedModel:
    """A model ready to train or to score, with what is needed to save it like its source."""

    policy: PolicyModel
    source_dtype: torch.dtype
    """How the source stores its weights; GGUF counts as float32, the dtype it unpacks to."""
    zeroed_dropout: dict[str, float]
    """Config fields that `disable_dropout` set to 0, with the values to put back on saving."""
    attention: str
    """Of the model as it was loaded: what generates text, where rows are not packed."""
    adapter: "Adapter | None" = None
    """What trains in place of the weights; None: all weights train."""

    @property
    def num_parameters(self) -> int:
        """Parameters, tied ones once; of packed ones the numbers that they stand for."""
        return sum(num_weights(p) for p in self.policy.parameters())

    @property
    def num_trainable(self) -> int:
        """Parameters that training changes."""
        return sum(p.numel() for p in self.policy.parameters() if p.requires_grad)


def check_model_files(name: str, key: str = "model_name_or_path") -> None:
    """Refuse a local path that cannot be loaded, before anything heavy starts.

    Args:
        name: folder, .gguf file or hub id.
        key: the option that named it.

    Raises:
        ModelError: the path looks local and is absent, or is a folder without config or weights.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise _is_an_adapter(key, name)
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{key} is {name!r}: the folder has no config.json; "
                "give a folder in the Hugging Face format, a hub id or a .gguf file"
            )
        _check_weight_files(path, key, name)
        return
    looks_local = name.startswith(("/", ".", "~")) or name.endswith(".gguf")
    if path.is_file() and name.endswith(".gguf"):
        return
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(
            f"{key} is {name!r}: no such folder or .gguf file; "
            "give a folder, a .gguf file or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"
        )


def _check_weight_files(folder: Path, key: str, name: str) -> None:
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        pickled = [next(folder.glob(pattern), None) for pattern in PICKLED_FILES]
        if found := next(filter(None, pickled), None):
            raise ModelError(
                f"{key} is {name!r}, whose weights are pickled ({found.name}): reading a pickle "
                "may run code, so preftune does not; where you trust it, load it with transformers "
                "and save it again with safetensors (save_pretrained does)"
            )
        raise ModelError(
            f"{key} is {name!r}: the folder has a config.json but no weights (*.safetensors); "
            "copy them there or give another model"
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            outside = [file for file in files if Path(file).name != file]
            pickled = [file for file in files if not file.endswith(".safetensors")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{key} is {name!r}: {index.name} cannot be read ({type(error).__name__}: "
                f"{error}); copy the model again"
            ) from error
        if outside or pickled:
            what = "outside of the folder" if outside else "that are not safetensors"
            raise ModelError(
                f"{key} is {name!r}: its {index.name} names files {what} "
                f"({(outside or pickled)[0]}); copy the model again, or save it with safetensors"
            )


def _is_an_adapter(key: str, name: str) -> ModelError:
    # transformers would load it with its base, or, where it cannot, the bare base alone.
    return ModelError(
        f"{key} is {name!r}, an adapter (it has an adapter_config.json); to train it on, give its "
        "base here, and the adapter with --use_lora true --adapter_name_or_path; otherwise merge "
        "the two (preftune merge), and give that folder"
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the config names, else the model's own.

    Raises:
        ModelError: it cannot be found or read.
    """
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name is not None  # the config refuses an unset model
    path, options = _location(name)
    if config.tokenizer_name_or_path is None and "gguf_file" not in options:
        options["revision"] = config.model_revision
    elif config.tokenizer_revision is not None:
        options["revision"] = config.tokenizer_revision
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        key = "tokenizer_name_or_path" if config.tokenizer_name_or_path else "model_name_or_path"
        raise _cannot_load("tokenizer", key, name, error) from error


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """Load the architecture's config that `config` names; reads no weights.

    Raises:
        ModelError: it cannot be found or read.
    """
    name = config.model_name_or_path
    assert name is not None  # the config refuses an unset model
    path, options = _model_location(config)
    try:
        loaded = AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        raise _cannot_load("model", "model_name_or_path", name, error) from error
    attention = str(getattr(loaded, "_attn_implementation", None) or "")
    if "/" in attention:
        # transformers would fetch that repository and run its code.
        raise ModelError(
            f"model_name_or_path is {name!r}: its config.json asks for the attention kernel "
            f"{attention!r}, which is code of a repository; delete attn_implementation there, and "
            "choose one with --attn_implementation"
        )
    if "gguf_file" not in options:  # transformers unpacks those
        refuse_quantized_files(loaded, name)
    return loaded


def model_commit(config: ModelConfig, prefix: str = "", key: str | None = None) -> str | None:
    """The commit that `model_revision` stands for now; None for a model of this machine.

    Args:
        config: names the model.
        prefix: of the options that named it, such as "reference_".
        key: what named it, where that is no such option.

    Raises:
        ModelError: the model cannot be found, or a revision is asked of one without any.
    """
    name = str(config.model_name_or_path)
    key = key or f"{prefix}model_name_or_path"
    check_model_files(name, key)
    if Path(name).expanduser().exists():
        if config.model_revision is not None:
            raise ModelError(
                f"{prefix}model_revision is {config.model_revision!r}, but {name} is on this "
                "machine and has no revisions; leave it out"
            )
        return None
    try:
        # The folder of a file in the Hub's cache is named by the commit.
        return Path(
            hf_hub_download(name, "config.json", revision=config.model_revision)
        ).parent.name
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        raise _cannot_load("model", key, name, error) from error


def load_model(
    config: ModelConfig, device: torch.device, products: torch.dtype | None = None
) -> LoadedModel:
    """Load the causal LM that the config names, in eval mode, on `device`.

    Args:
        config: what to load; `dtype` is how the weights are kept.
        device: where to put it; on "meta" it has shapes and no numbers, and whether its head can be
            compact is not known.
        products: the type that products will be computed in, where it is not the weights'; 4-bit
            weights are unpacked to it.

    Raises:
        ModelError: it cannot be found or read, or lacks weights.
    """
    name = config.model_name_or_path
    assert name is not None  # the config refuses an unset model
    check_model_files(name)
    model_config = load_model_config(config)
    source_dtype = getattr(model_config, "dtype", None) or torch.float32
    zeroed = zero_dropout(model_config) if config.disable_dropout else {}
    path, options = _model_location(config)
    options |= _placing(config, device, products)
    try:
        # With output_loading_info it returns a pair, which its annotation does not say.
        model, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            path,
            config=model_config,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        raise _cannot_load("model", "model_name_or_path", name, error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _is_an_adapter("model_name_or_path", name)
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"model_name_or_path is {name!r}: its files lack {len(missing)} weights of a causal LM "
            f"({', '.join(missing[:3])}), which would be random; give a complete causal LM"
        )
    if "gguf_file" in options:
        model, source_dtype = _without_gguf_marks(model), torch.float32
    if config.disable_dropout:
        zero_dropout_modules(model)
    nn.Module.to(model, device)
    if config.is_quantized:
        make_right(model)
    model.eval()
    compact = device.type != "meta" and head_is_plain(model)
    if config.gradient_checkpointing:
        recompute(model, config.gradient_checkpointing)
    policy = PolicyModel(model, compact_head=compact, use_cache=config.use_cache)
    policy.activation_offload = config.activation_offload
    return LoadedModel(policy, source_dtype, zeroed, str(model.config._attn_implementation))


def _placing(
    config: ModelConfig, device: torch.device, products: torch.dtype | None
) -> dict[str, Any]:
    """How transformers shall lay a model out."""
    options: dict[str, Any] = {}
    if config.attn_implementation in ("eager", "sdpa"):
        # The other kernels are given to the model when it is known to be right with them
        # (`layout_choice`); until then it computes in types that they cannot.
        options["attn_implementation"] = config.attn_implementation
    if device.type == "meta":
        options["device_map"] = "meta"
    elif config.is_quantized:
        options["device_map"] = {"": device}
        options["quantization_config"] = loading_options(config, products)
    return options


def saved_dtype(loaded: LoadedModel, choice: SaveDtype) -> torch.dtype:
    """How weights are written: auto is as the source of the model has them, adapters in fp32."""
    if choice == "auto":
        return loaded.source_dtype if loaded.adapter is None else torch.float32
    return DTYPES[choice]


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as it is written, in the host's memory."""
    cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return cast.detach().cpu().contiguous()


def own_weights(loaded: LoadedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights of a model that is whole here, as they are written."""
    return {k: in_dtype(tensor, dtype) for k, tensor in written_weights(loaded).items()}


def written_weights(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """What of a model is written when it is trained: all of it, or its adapter."""
    model = loaded.policy.model
    return named_weights(model) if loaded.adapter is None else trained_weights(model)


def save_model(
    loaded: LoadedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> torch.dtype:
    """Write a plain Hugging Face folder: config, safetensors, tokenizer, chat template.

    Args:
        loaded: whose architecture and config to write.
        weights: by the names of `named_weights`, see `own_weights`.
        tokenizer: saved beside the weights.
        folder: must not hold anything yet.

    Returns:
        The dtype of the weights.
    """
    model = loaded.policy.model
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    held = {key: getattr(model.config, key) for key in loaded.zeroed_dropout}
    try:
        for key, value in loaded.zeroed_dropout.items():
            setattr(model.config, key, value)
        model.save_pretrained(folder, state_dict=weights)
    finally:
        for key, value in held.items():
            setattr(model.config, key, value)
    # transformers writes the dtype of the live parameters, not that of what it saved.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    return dtype


def stop_at(model: PreTrainedModel, token_id: int) -> bool:
    """Let `generate` stop at a token, too; returns whether that is new.

    A chat template may end answers with another token than the base model's end of sequence.
    """
    settings = model.generation_config
    assert settings is not None  # models that generate have one
    known = settings.eos_token_id
    ids = [] if known is None else known if isinstance(known, list) else [known]
    if token_id in ids:
        return False
    settings.eos_token_id = [*ids, token_id]
    return True


def named_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, tied ones once, under the first of their names.

    They are the model's own, also where an engine keeps only a part of each here.
    """
    seen: set[int] = set()
    weights: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor
    return weights


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those of `named_weights` that training may change: no frozen parameters."""
    # Quantised layers also put the scales of their weights among the names, which are no buffers.
    buffers = {id(buffer) for buffer in model.buffers()}
    return {
        name: tensor
        for name, tensor in named_weights(model).items()
        if tensor.requires_grad or id(tensor) in buffers
    }


def _location(name: str) -> tuple[str, dict[str, Any]]:
    path = Path(name).expanduser()
    if name.endswith(".gguf") and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return (str(path) if path.is_dir() else name), {}


def _model_location(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    path, options = _location(str(config.model_name_or_path))
    if "gguf_file" not in options:
        options["revision"] = config.model_revision
    return path, options | {"trust_remote_code": config.trust_remote_code}


def _cannot_load(what: str, key: str, name: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"{key} is {name!r}: the {what} cannot be loaded ({reason}); check the name, the files "
        "and, for a hub id, the network and your access rights"
    )


def dropout_settings(config: Any) -> dict[str, float]:
    """The fields of a model's config that switch dropout on."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value > 0
    }


def zero_dropout(config: Any) -> dict[str, float]:
    """Set the dropout fields of an architecture's config to 0; gives what they were."""
    # Attention reads its dropout from the config, not from an nn.Dropout module, so both are set.
    zeroed = dropout_settings(config)
    for key in zeroed:
        setattr(config, key, 0.0)
    return zeroed


def zero_dropout_modules(model: nn.Module) -> None:
    """Let a model's modules drop nothing."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _without_gguf_marks(model: PreTrainedModel) -> PreTrainedModel:
    # A model read from GGUF carries a quantization_config and refuses save_pretrained, although
    # its weights are plain by then: put them into a fresh model of the same config.
    config = model.config
    state = model.state_dict()
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=config._attn_implementation
    )
    plain.load_state_dict(state)
    plain.tie_weights()
    return plain
