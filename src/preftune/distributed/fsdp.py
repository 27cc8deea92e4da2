"""PyTorch's FSDP2: weights, gradients and optimizer state cut over the ranks."""

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
from preftune.distributed.engine import MakeOptimizer, TorchEngine


class FSDPEngine(TorchEngine):
    """FSDP2 around each layer, and around what is left: embeddings, last norm and head.

    A step's gradients are reduced with every micro-batch, so that no rank ever holds them whole.
    """

    model: Any
    is_sharded = True

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        config: DistributedConfig,
        *,
        max_grad_norm: float | None,
        compute_dtype: torch.dtype | None,
        device: torch.device,
        world_size: int,
        host_size: int,
    ) -> None:
        """Cut the model's parameters, in place.

        Args:
            model: whole, with the same weights on every rank.
            make_optimizer: makes the optimizer of the parts.
            config: how to cut.
            max_grad_norm: longest gradient; None or 0 is off.
            compute_dtype: of gathered weights and of activations; None: as the weights are kept.
                Gradients are added over ranks in fp32. Of float16, which ends at 65,504, only the
                layers' weights and products are: the model's forward has autocast.
            device: of this rank.
            world_size: ranks of all hosts.
            host_size: ranks of this host.
        """
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
        for layer in repeated_layers(model):
            fully_shard(layer, **options)
        # Its weights are wanted again at once: the head's, at the start of the backward.
        options["reshard_after_forward"] = False
        if is_narrow:  # embeddings are what the first layer is given
            options["mp_policy"] = MixedPrecisionPolicy(None, torch.float32)
        fully_shard(model, **options)
        super().__init__(config.engine, model, make_optimizer(model), max_grad_norm)

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


def make_mesh(
    config: DistributedConfig, device: torch.device, world_size: int, host_size: int
) -> DeviceMesh:
    """Which ranks cut the model among them."""
    if config.fsdp == "full_shard":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    size = config.fsdp_shard_size or host_size
    return init_device_mesh(
        device.type, (world_size // size, size), mesh_dim_names=("replicate", "shard")
    )


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a stack of: the list of modules that holds most parameters."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=_num_parameters, default=[])


def _num_parameters(stack: list[nn.Module]) -> int:
    return sum(p.numel() for layer in stack for p in layer.parameters())
