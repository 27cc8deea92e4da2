"""The random generators of a process as tensors: Python's, NumPy's, torch's, the device's."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def generator_tensors(device: torch.device) -> dict[str, Tensor]:
    """Where each generator of this process stands.

    Args:
        device: that this process computes on.
    """
    version, internal, next_normal = random.getstate()
    _, keys, position, has_normal, normal = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal]),
        # The second of a pair of normal numbers, where the first has been drawn alone.
        "python_normal": torch.tensor(
            [] if next_normal is None else [next_normal], dtype=torch.float64
        ),
        "numpy": torch.tensor([*map(int, np.asarray(keys)), int(position), int(has_normal)]),
        "numpy_normal": torch.tensor([float(normal)], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on where `generator_tensors` stood."""
    torch.set_rng_state(states["torch"])
    version, *internal = states["python"].tolist()
    random.setstate((version, tuple(internal), next(iter(states["python_normal"].tolist()), None)))
    *keys, position, has_normal = states["numpy"].tolist()
    words = np.array(keys, dtype=np.uint32)
    normal = float(states["numpy_normal"])
    np.random.set_state(("MT19937", words, position, has_normal, normal))
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["device"], device)
