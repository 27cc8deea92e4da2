"""A large model cut short, so that one device can try on it what depends on its kinds of layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from preftune.distributed.delivery import repeated_layers
from preftune.model.forward import PolicyModel


@contextmanager
def shallow(policy: PolicyModel, device: torch.device) -> Iterator[None]:
    """For a while, have a model's first layers alone, on a device: at least one of every kind.

    Its numbers are those of a model of its own: whatever is compared must be computed in here.

    Args:
        policy: in the host's memory, and back there afterwards.
        device: where to try something.
    """
    layers = repeated_layers(policy)
    stack = next(m for m in policy.modules() if isinstance(m, nn.ModuleList) and [*m] == layers)
    config, whole = policy.model.config.get_text_config(), stack._modules
    number = config.num_hidden_layers
    first = num_of_all_kinds(layers)
    stack._modules = dict(list(whole.items())[:first])
    config.num_hidden_layers = first
    try:
        policy.to(device)
        yield
    finally:
        policy.to("cpu")
        stack._modules, config.num_hidden_layers = whole, number


def num_of_all_kinds(layers: Sequence[nn.Module]) -> int:
    """How many layers from the first on have one of every kind among them."""
    seen: set[str] = set()
    last = 0
    for number, layer in enumerate(layers, start=1):
        kind = f"{layer} {[_settings(module) for module in layer.modules()]}"
        if kind not in seen:
            seen.add(kind)
            last = number
    return last


def _settings(module: nn.Module) -> list[tuple[str, bool | int | str | None]]:
    """What else may set a layer apart, such as a sliding window; its own number does not."""
    return [
        (key, value)
        for key, value in vars(module).items()
        if isinstance(value, bool | str | None)
        or (isinstance(value, int) and "idx" not in key and "layer" not in key)
    ]
