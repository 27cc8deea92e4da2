"""Weights in 4 or 8 bits, by bitsandbytes: how they get there, what they count, and back.

Adapters train over them (QLoRA); the quantised weights themselves never change.
"""

import math
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from preftune.config.model import ModelConfig
from preftune.errors import ModelError

PACKAGE = "bitsandbytes"
BLOCK = 64
"""Weights that share a scale in 4 bits."""


def _library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's names that are about to go
        import bitsandbytes

    return bitsandbytes


def loading_options(config: ModelConfig, products: torch.dtype | None) -> BitsAndBytesConfig:
    """What transformers is told.

    Args:
        config: one that is quantised.
        products: what `bnb_4bit_compute_dtype` auto stands for; None is fp32.
    """
    _library()
    if config.load_in_8bit:
        # No columns of outliers: which they are depends on all rows of a forward.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    name = config.bnb_4bit_compute_dtype
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,  # pyright: ignore[reportArgumentType]
        bnb_4bit_use_double_quant=bool(config.bnb_4bit_use_double_quant),
        bnb_4bit_compute_dtype=products or torch.float32 if name == "auto" else name,
    )


def make_right(model: PreTrainedModel) -> None:
    """Let quantised layers be the same function in training and in evaluation.

    Args:
        model: just loaded; changed in place.

    Raises:
        ModelError: no layer of it is quantised.
    """
    library, layers = _library(), quantized_layers(model)
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no linear layers that bitsandbytes could quantise; leave "
            "out load_in_4bit and load_in_8bit"
        )
    eight_bit = _eight_bit_class()
    for layer in layers.values():
        if isinstance(layer, library.nn.Linear8bitLt):
            layer.__class__ = eight_bit
        else:
            # On CPUs with AVX-512 BF16 its first forward without gradients would pack the weight
            # anew, for good: with scales in bf16, and with a product that has no backward.
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                # The first forward would cast it, for good.
                layer.bias.data = layer.bias.data.to(layer.compute_dtype)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose weights are in 4 or 8 bits, by name."""
    library = sys.modules.get(PACKAGE)
    if library is None:  # nothing here has made such a layer
        return {}
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def names_to_quantize(model: PreTrainedModel) -> set[str]:
    """The layers that transformers would quantise: all linear ones but the head.

    Args:
        model: not quantised; may be without numbers.
    """
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, kept)
    }


def refuse_quantized_files(config: PreTrainedConfig, name: str) -> None:
    """Refuse a model whose files hold quantised weights.

    Args:
        config: of its architecture.
        name: what the user calls it.

    Raises:
        ModelError: they do.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    raise ModelError(
        f"model_name_or_path is {name!r}, whose files hold weights that are quantised already "
        f"({getattr(method, 'value', method)}, in its config.json): give the model that it was "
        "made from; --load_in_4bit true quantises that as it is loaded"
    )


# ---------------------------------------------------------------- what they are


def product_dtype(model: nn.Module) -> torch.dtype | None:
    """The type that 4-bit layers compute in, whatever they are given; None without such layers."""
    for layer in quantized_layers(model).values():
        return getattr(layer, "compute_dtype", None)
    return None


def base_as_trained(model: nn.Module, config: ModelConfig) -> dict[str, Any]:
    """How a model is quantised, as options, for those who shall do it again; empty if it is not.

    Args:
        model: as it was loaded; says what `bnb_4bit_compute_dtype` auto stood for.
        config: that it was loaded by.
    """
    if not config.is_quantized:
        return {}
    record = config.quantization | {"dtype": config.dtype}
    products = product_dtype(model)
    if products is not None:
        record["bnb_4bit_compute_dtype"] = str(products).removeprefix("torch.")
    return record


def describe(model: nn.Module) -> dict[str, str]:
    """What the numbers of quantised layers depend on besides weights and settings."""
    return {PACKAGE: version(PACKAGE)} if quantized_layers(model) else {}


def num_weights(parameter: Tensor) -> int:
    """The numbers that a parameter stands for: of a packed one, more than it has elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def num_quantized(model: nn.Module) -> int:
    """Parameters that are kept in 4 or 8 bits."""
    return sum(num_weights(layer.weight) for layer in quantized_layers(model).values())


def num_bytes(model: nn.Module) -> int:
    """Memory of parameters and buffers with the scales of packed ones; what is shared once."""
    held: dict[int, int] = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter.data
        for value in _scales(parameter):
            if isinstance(value, Tensor):
                yield value


def _scales(parameter: Any) -> list[Any]:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return [getattr(parameter, "SCB", None)]
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


# ---------------------------------------------------------------- and back


@torch.no_grad()
def dequantized(layer: Any) -> Tensor:
    """The weight that a quantised layer stands for, in fp32, d_out x d_in."""
    library, weight = _library(), layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return _unpacked(weight.data, weight.SCB, torch.float32)
    if state.nested:
        scales = library.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    else:
        scales = state.absmax
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.data, scales.float(), state.blocksize, state.quant_type, state.shape, torch.float32
    )


@torch.no_grad()
def quantized_again(weight: Tensor, config: ModelConfig) -> Tensor:
    """What a weight would become if it were quantised, in its own type.

    Args:
        weight: d_out x d_in.
        config: how.
    """
    functions = _library().functional
    if config.load_in_8bit:
        packed, scales, _ = functions.int8_vectorwise_quant(weight.half())
        return _unpacked(packed, scales, weight.dtype)
    packed, state = functions.quantize_4bit(
        weight.contiguous(),
        blocksize=BLOCK,
        compress_statistics=bool(config.bnb_4bit_use_double_quant),
        quant_type=config.bnb_4bit_quant_type,
    )
    return functions.dequantize_4bit(packed, state)


def _unpacked(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit integers times the scales of their rows."""
    return packed.to(dtype).mul_((scales / 127).unsqueeze(1))


class _UnpackedProduct(torch.autograd.Function):
    """x W^T with W unpacked from 8 bits, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scales)
        return functional.linear(x, _unpacked(packed, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, scales = ctx.saved_tensors
        return grads[0] @ _unpacked(packed, scales, grads[0].dtype), None, None


@cache
def _eight_bit_class() -> type[nn.Module]:
    """bitsandbytes' layer, with another forward.

    Its own rounds inputs to 8 bits as well: on GPUs always, on CPUs in evaluation alone, so that
    reference and policy would not be one function.
    """

    class EightBitLinear(_library().nn.Linear8bitLt):
        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
            y = _UnpackedProduct.apply(x.to(dtype), self.weight.data, self.weight.SCB)
            return y if self.bias is None else y + self.bias.to(dtype)

    return EightBitLinear
