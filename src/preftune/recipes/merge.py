"""`preftune merge`: a base and its adapter become one plain model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.config.lora import LoRAConfig
from preftune.config.merge import MergeConfig
from preftune.config.model import ModelConfig
from preftune.errors import CheckpointError, ConfigError, ModelError
from preftune.files import fsync, remove_tree
from preftune.model.adapter_files import (
    ADAPTER,
    RECORD_FILE,
    adapter_folder,
    base_record,
    read_config,
)
from preftune.model.adapters import (
    StartAdapter,
    adapted_layers,
    add_adapter,
    check_adapter,
    skeleton,
    whole_layers,
)
from preftune.model.load import (
    DTYPES,
    LoadedModel,
    in_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
    named_weights,
    save_model,
    saved_dtype,
)
from preftune.model.quantization import dequantized, quantized_again, quantized_layers
from preftune.recipes.preflight import check_quantization
from preftune.training.run_folder import check_writable

PROBES, PROBE_TOKENS = 4, 64
TOLERANCE = 1e-3
"""Largest difference of logits, of their largest size; rounding in fp32 makes some 1e-6 to 1e-4."""


def merge(config: MergeConfig) -> str:
    """Add an adapter to its base, compare, and write the sum.

    Args:
        config: which, and where to.

    Returns:
        What was written and how near it is, for people.

    Raises:
        PreftuneError: base or adapter cannot be read, the folder exists or cannot be written, or
            the merged model is not the adapter's.
    """
    target = Path(str(config.output)).expanduser()
    if target.exists():
        raise CheckpointError(f"output is {config.output!r}, which exists; give a new folder")
    check_writable("output", target)
    base, lora = _parts(config)
    trained = _base_as_trained(config, base)
    trusted = config.trust_remote_code
    check_adapter(lora, skeleton(load_model_config(base), trust_remote_code=trusted))
    tokenizer = load_tokenizer(_tokenizer_of(config, base))
    loaded = load_model(base, torch.device("cpu"))
    model = loaded.policy.model
    add_adapter(model, StartAdapter(lora, seed=0))
    expected = _logits(model)
    quantized = None if trained is None else _Quantized.load(trained, lora, expected)
    if quantized is not None and config.base != "original":
        quantized.put_into(model)
        expected = quantized.logits
    _merge_layers(model)
    difference = _difference(_logits(model), expected)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"adapter is {config.adapter!r}: the merged model's logits differ from those of base "
            f"and adapter by {difference:.2g} of the largest, and {TOLERANCE:g} is allowed; "
            "nothing was written; keep the adapter as it is"
        )
    dtype = saved_dtype(loaded, config.save_dtype)
    weights = {name: in_dtype(t, dtype) for name, t in named_weights(model).items()}
    _write(target, loaded, weights, tokenizer)
    nn.Module.to(nn.Module.to(model, dtype), torch.float32)
    rounded = _difference(_logits(model), expected)
    name = str(dtype).removeprefix("torch.")
    return (
        f"written: {target} ({name}); logits of {PROBES} probe rows, next to those of base and "
        f"adapter: {difference:.1g} of the largest away in float32, {rounded:.1g} as written"
        + ("" if quantized is None else quantized.told(model, config.base))
    )


@dataclass(frozen=True)
class _Quantized:
    """The quantised base that an adapter was trained over, with it."""

    config: ModelConfig
    layers: Mapping[str, nn.Module]
    """The quantised ones, by the names that they have beside PEFT's."""
    logits: Tensor
    original_differs: float
    """How far the logits of the original base and the adapter are from these."""

    @classmethod
    def load(cls, config: ModelConfig, lora: LoRAConfig, original: Tensor) -> "_Quantized":
        """Load both, and compare.

        Args:
            config: of the base.
            lora: the adapter.
            original: logits of the base as its files have it, and the adapter.
        """
        model = load_model(config, torch.device("cpu")).policy.model
        add_adapter(model, StartAdapter(lora, seed=0))
        logits = _logits(model)
        return cls(config, quantized_layers(model), logits, _difference(original, logits))

    @torch.no_grad()
    def put_into(self, model: PreTrainedModel) -> None:
        """Give the original base, with PEFT's layers, the weights that the quantised ones are."""
        for name, layer in self.layers.items():
            _set_weight(model.get_submodule(name), dequantized(layer))

    @torch.no_grad()
    def told(self, model: PreTrainedModel, base: str) -> str:
        """For people.

        Args:
            model: as written; is quantised again, to see what that does.
            base: what it was merged into.
        """
        kind = (
            "8 bits" if self.config.load_in_8bit else f"4 bits, {self.config.bnb_4bit_quant_type}"
        )
        trained = f"the quantised base that the adapter was trained over ({kind})"
        if base == "original":
            return (
                f"; {trained} says something else, {self.original_differs:.1g} of the largest away "
                "from the original one: --base dequantized merges into what training saw"
            )
        for name in self.layers:
            layer = model.get_submodule(name.removesuffix(".base_layer"))
            weight = _linear_weight(layer)
            again = quantized_again(weight.to(DTYPES[self.config.dtype]), self.config)
            _set_weight(layer, again.float())
        again = _difference(_logits(model), self.logits)
        return (
            f"; the base is what {trained} stands for. In its place the original weights would be "
            f"{self.original_differs:.1g} away, and the merged ones, quantised again, {again:.1g}"
        )


def _linear_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer, d_out x d_in."""
    weight: Any = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    _linear_weight(layer).copy_(weight)


def _base_as_trained(config: MergeConfig, base: ModelConfig) -> ModelConfig | None:
    """The base as it was quantised in the adapter's training; None if it was not.

    Raises:
        ConfigError: the dequantised base is asked for, and how it was quantised is not known; or
            bitsandbytes is not installed.
    """
    name = str(config.adapter)
    record = base_record(name, config.adapter_revision, "adapter")
    if not record:
        if config.base == "dequantized":
            raise ConfigError(
                f"base is 'dequantized', and {name} has no {RECORD_FILE} that says how its base "
                "was quantised; leave it out"
            )
        return None
    # Products in fp32, whatever they were in: only rounding is between them.
    quantized = replace(base, **record)
    if quantized.load_in_4bit:
        quantized.bnb_4bit_compute_dtype = "float32"
    check_quantization(quantized)
    return quantized


def _parts(config: MergeConfig) -> tuple[ModelConfig, LoRAConfig]:
    """The base and the adapter."""
    name = str(config.adapter)
    folder = adapter_folder(name, config.adapter_revision, "adapter")
    files = read_config(folder, name, "adapter")
    given = config.model_name_or_path
    base = given or files.base_model_name_or_path
    if not base:
        raise ModelError(
            f"adapter is {name!r}, whose files name no base; give it with --model_name_or_path"
        )
    model = ModelConfig(
        model_name_or_path=base,
        model_revision=None if given else files.revision,
        trust_remote_code=config.trust_remote_code,
    )
    lora = LoRAConfig(
        use_lora=True, adapter_name_or_path=name, adapter_revision=config.adapter_revision
    )
    return model, lora


def _tokenizer_of(config: MergeConfig, base: ModelConfig) -> ModelConfig:
    """The adapter's own tokenizer, with its chat template, where it brings one."""
    folder = adapter_folder(str(config.adapter), config.adapter_revision, "adapter")
    if (folder / "tokenizer_config.json").is_file():
        return ModelConfig(
            model_name_or_path=base.model_name_or_path,
            tokenizer_name_or_path=str(folder),
            trust_remote_code=base.trust_remote_code,
        )
    return base


@torch.no_grad()
def _merge_layers(model: PreTrainedModel) -> None:
    """Put plain layers with the sums in the place of PEFT's."""
    for name, layer in adapted_layers(model):
        layer.merge(adapter_names=[ADAPTER])
        model.set_submodule(name, layer.get_base_layer())
    for name, wrapper in whole_layers(model):
        model.set_submodule(name, wrapper.modules_to_save[ADAPTER])
    del model.peft_config  # pyright: ignore


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", PROBE_TOKENS))
    ids = torch.randint(size, (PROBES, length), generator=generator)
    return model(input_ids=ids, use_cache=False).logits.float()


def _difference(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _write(
    target: Path, loaded: LoadedModel, weights: dict[str, Tensor], tokenizer: object
) -> None:
    """Write beside, and rename: the folder is whole or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".partial-{target.name}")
    remove_tree(temporary)
    try:
        save_model(loaded, weights, tokenizer, temporary)  # pyright: ignore[reportArgumentType]
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        temporary.rename(target)
        fsync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error}); free some space, or give another --output"
        ) from error
    finally:
        remove_tree(temporary)
