"""A model that no device holds whole: its numbers come from rank 0's host, layer by layer."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from preftune.distributed.ranks import Ranks


def starting_place(device: torch.device, ranks: Ranks, *, is_cut: bool) -> torch.device:
    """Where a rank loads a model to.

    Args:
        device: where this rank computes.
        ranks: the ranks.
        is_cut: whether an engine cuts the weights over the ranks. Then they are on rank 0's host
            alone, and on the others as shapes without numbers ("meta"), until a `Delivery`.
    """
    if not is_cut:
        return device
    return torch.device("cpu" if ranks.is_main else "meta")


class Delivery:
    """Parameters and buffers of a model, on their way to all ranks.

    What has come is on this rank's device, whole: an engine cuts it before it asks for more, so a
    device never holds more than one part that is whole.
    """

    def __init__(self, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
        """See what has to come; nothing moves yet.

        Args:
            model: on rank 0 with its weights, on the others with at least their shapes.
            device: of this rank.
            ranks: all of them do the same.

        Raises:
            ConfigError: the shapes are not the same on all ranks; on every rank.
        """
        self._device, self._ranks = device, ranks
        self._places_left = Counter(id(tensor) for *_, tensor in _places(model))
        # Kept, so that no other tensor gets the address of one that has been replaced.
        self._awaited = {id(tensor): tensor for *_, tensor in _places(model)}
        self._arrived: dict[int, Tensor] = {}
        shapes = [
            (name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in model.state_dict(keep_vars=True).items()
        ]
        ranks.agree(
            {"the shapes of weights (their hash)": xxhash.xxh3_64_hexdigest(repr(shapes).encode())},
            "give all hosts the same model files and packages",
        )

    def bring(self, module: nn.Module) -> None:
        """Let all that a module holds come, unless it has; all ranks call it with the same one."""
        for held, key, tensor in list(_places(module)):
            number = id(tensor)
            if number not in self._awaited:
                continue
            if number not in self._arrived:
                self._arrived[number] = self._come(tensor)
            held[key] = self._arrived[number]
            self._places_left[number] -= 1
            if not self._places_left[number]:  # tied weights stand in several places
                del self._awaited[number], self._arrived[number]

    @torch.no_grad()
    def _come(self, tensor: Tensor) -> Tensor:
        arrived = tensor
        if tensor.is_meta:
            arrived = torch.empty_like(tensor, device=self._device)
            if isinstance(tensor, nn.Parameter):
                arrived = nn.Parameter(arrived, tensor.requires_grad)
                vars(arrived).update(vars(tensor))  # marks that libraries have left
        arrived.data = arrived.data.to(self._device).contiguous()
        self._ranks.send_into(arrived.data)
        return arrived


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a module, and those in it, hold tensors: as parameter, buffer or plain attribute."""
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers, vars(owner)):
            for key, tensor in held.items():
                if isinstance(tensor, Tensor):
                    yield held, key, tensor


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that a model is a stack of: the list of modules that holds most parameters."""
    stacks = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(stacks, key=_num_parameters, default=[])


def _num_parameters(stack: list[nn.Module]) -> int:
    return sum(p.numel() for layer in stack for p in layer.parameters())
