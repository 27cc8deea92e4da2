"""PyTorch's FSDP2: weights, gradients and optimizer state cut over the ranks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from preftune.config.distributed import DistributedConfig
from preftune.distributed.delivery import Delivery, repeated_layers
from preftune.distributed.engine import TorchEngine
from preftune.errors import ModelError


class FSDPEngine(TorchEngine):
    """FSDP2 around each layer, and around what is left: embeddings, last norm and head.

    A step's gradients are reduced with every micro-batch, so that no rank ever holds them whole.
    """

    model: Any
    is_sharded = True

    def _norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Over all ranks."""
        norm = super()._norm(parameters)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def rest(self) -> None:
        """Drop gathered weights: without a backward some stay, in place of this rank's parts."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def make_state(self, *, with_gradients: bool) -> None:
        """A skipped update makes the optimizer's state."""
        self.rest()
        super().make_state(with_gradients=with_gradients)

    def update(self, *, skip: Tensor) -> None:
        """Update the weights, unless the flag is set."""
        device = next(self.model.parameters()).device
        if self.loss_scale is not None:
            # The optimizer would not wait for a copy to the host.
            self.loss_scale = self.loss_scale.to(device)
        super().update(skip=skip.to(device))


def cut_by_layers(
    model: nn.Module,
    config: DistributedConfig,
    delivery: Delivery,
    *,
    compute_dtype: torch.dtype | None,
    device: torch.device,
    world_size: int,
    host_size: int,
) -> None:
    """Cut a model's parameters over the ranks, in place.

    Args:
        model: what `delivery` was made for.
        config: how to cut; over all ranks where it names no `fsdp`.
        delivery: brings the weights.
        compute_dtype: of gathered weights and of activations; None: as the weights are kept.
            Gradients are added over ranks in fp32. Of float16, which ends at 65,504, only the
            layers' weights and products are: the model's forward has autocast.
        device: of this rank.
        world_size: ranks of all hosts.
        host_size: ranks of this host.

    Raises:
        ModelError: layers share weights.
    """
    layers = repeated_layers(model)
    check_layers_apart(model, layers)
    mesh = make_mesh(config, device, world_size, host_size)
    is_narrow = compute_dtype == torch.float16
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": config.fsdp_reshard_after_forward is not False,
        "mp_policy": MixedPrecisionPolicy(
            compute_dtype, torch.float32, cast_forward_inputs=not is_narrow
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
        if config.fsdp_offload_params
        else OffloadPolicy(),
    }
    for layer in layers:
        delivery.bring(layer)
        fully_shard(layer, **options)
    delivery.bring(model)
    # Its weights are wanted again at once: the head's, at the start of the backward.
    options["reshard_after_forward"] = False
    if is_narrow:  # embeddings are what the first layer is given
        options["mp_policy"] = MixedPrecisionPolicy(None, torch.float32)
    fully_shard(model, **options)


def check_layers_apart(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse weights that stand in several layers, or in one and outside: each is cut for itself.

    Raises:
        ModelError: there are such.
    """
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    units = [[*layer.parameters()] for layer in layers]
    units.append([p for module in outside for p in module.parameters(recurse=False)])
    owners = Counter(number for unit in units for number in {id(p) for p in unit})
    shared = [n for n, p in model.named_parameters() if owners[id(p)] > 1]
    if shared:
        raise ModelError(
            f"layers of the model share weights ({', '.join(shared[:3])}), which FSDP2 cannot cut "
            "layer by layer; leave out fsdp, or take --zero_stage 2"
        )


def make_mesh(
    config: DistributedConfig, device: torch.device, world_size: int, host_size: int
) -> DeviceMesh:
    """Which ranks cut the model among them."""
    if config.fsdp != "hybrid_shard":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    size = config.fsdp_shard_size or host_size
    return init_device_mesh(
        device.type, (world_size // size, size), mesh_dim_names=("replicate", "shard")
    )
