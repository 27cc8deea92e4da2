"""A model without numbers, as a run would hold it, and what can be counted of it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from preftune.batching.layout import PairLayout
from preftune.config.lora import LoRAConfig
from preftune.config.model import ModelConfig
from preftune.errors import ModelError
from preftune.model.activations import recompute
from preftune.model.adapter_files import adapted_layers
from preftune.model.adapters import inject, peft_config, skeleton
from preftune.model.attention import REGISTERED
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.load import (
    DTYPES,
    load_model_config,
    zero_dropout,
    zero_dropout_modules,
)
from preftune.model.quantization import names_to_quantize
from preftune.planning.stand_ins import FUSED_ATTENTION, pack, without_numbers


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has; tied ones once, packed ones as many as they stand for."""

    total: int
    trainable: int
    lora_by_module: dict[str, int]
    """Numbers of adapters by the last part of their layers' names; empty without adapters."""
    quantized: int


@dataclass(frozen=True)
class PlannedModel:
    """A policy whose tensors have shapes and no numbers."""

    policy: PolicyModel
    mode: FakeTensorMode
    parameters: Parameters
    products: torch.dtype | None
    """What autocast computes products in; None: no autocast."""

    def compute(self, run: Callable[[], object]) -> None:
        """Run something in the model's world."""
        with self.mode, without_numbers():
            run()


def plan_model(
    config: ModelConfig,
    lora: LoRAConfig,
    *,
    products: torch.dtype | None,
    stored: torch.dtype | None = None,
) -> PlannedModel:
    """Make a model of shapes as a run would load it.

    Args:
        config: of the model.
        lora: of its adapter, if `use_lora`.
        products: what products are computed in, where it is not the weights' type.
        stored: how weights are kept, where `config.dtype` does not say it. Then products are
            computed in the weights' type.

    Raises:
        ModelError: the architecture cannot be made or read.
    """
    model_config = load_model_config(config)
    if config.disable_dropout:
        zero_dropout(model_config)
    name = str(config.model_name_or_path)
    try:
        model = skeleton(model_config, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # whatever a model's own code does
        raise ModelError(f"model_name_or_path is {name!r}: {error}") from error
    if config.disable_dropout:
        zero_dropout_modules(model)
    total = sum(p.numel() for p in model.parameters())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    quantized = 0
    if config.is_quantized:
        named = dict(model.named_modules())
        quantized = sum(named[n].weight.numel() for n in names_to_quantize(model))  # type: ignore
    _give_types(model, stored or DTYPES[config.dtype])
    if config.is_quantized:
        pack(model, config, products)
    if lora.use_lora:
        inject(model, peft_config(lora), seed=0)
    with mode:
        _bring_to_cpu(model)
    if config.gradient_checkpointing:
        recompute(model, config.gradient_checkpointing)
    policy = PolicyModel(model, use_cache=config.use_cache)
    if products is not None and stored is None:
        policy.forward = torch.autocast("cpu", products)(policy.forward)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    adapters = sum(p.numel() for p in trainable) if lora.use_lora else 0
    counted = Parameters(
        total=total + adapters,
        trainable=sum(p.numel() for p in trainable),
        lora_by_module=lora_by_module(model) if lora.use_lora else {},
        quantized=quantized,
    )
    return PlannedModel(policy, mode, counted, products)


def _bring_to_cpu(model: nn.Module) -> None:
    """From "meta" to a device, where autocast and kernels are those of the device.

    What stands in several places (tied weights) still does; `nn.Module.to_empty` would part it.
    """
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    moved[id(tensor)] = (
                        nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    )
                held[key] = moved[id(tensor)]  # pyright: ignore[reportArgumentType]


def _give_types(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """As `from_pretrained` would load it: all in one type, but what the architecture keeps."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, module in model.named_modules():
        wide = any(part in kept for part in name.split("."))
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if wide else dtype)


def lora_by_module(model: nn.Module) -> dict[str, int]:
    """Numbers of adapters by the last part of their layers' names."""
    counts: Counter[str] = Counter()
    for name, layer in adapted_layers(model):
        own = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        counts[name.rpartition(".")[2]] += own
    return dict(counts)


def use_packing(planned: PlannedModel, layout: PairLayout, *, fused: bool) -> bool:
    """Let a model take packed rows; whether its layers do, which some architectures' do not.

    Args:
        planned: gets the attention, for good where its layers take it.
        layout: a packed row, to try.
        fused: whether attention is one call of a kernel, as on GPUs.
    """
    model = planned.policy.model
    before = model.config._attn_implementation

    def run() -> None:
        model.set_attn_implementation(FUSED_ATTENTION if fused else REGISTERED["sdpa"])
        with torch.no_grad():
            pair_logps(planned.policy, layout)

    try:
        planned.compute(run)
        follows = any(b.segments is not None and b.segments.calls for b in layout.blocks)
    except Exception:  # whatever a model does with a name or keyword that it does not know
        follows = False
    if not follows:
        assert before is not None  # transformers has chosen one by now
        model.set_attn_implementation(before)
    return follows
