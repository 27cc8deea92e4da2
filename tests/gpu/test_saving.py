"""Copies of a state on a GPU are of the moment they were asked for, and the host does not wait."""

import pytest
import torch

from preftune.training.checkpoint import Snapshot
from preftune.training.saver import CheckpointSaver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_an_update_on_the_device_waits_for_the_copy():
    """The copy of 1 GiB over the bus is far slower than the update that changes what it reads."""
    device = torch.device("cuda")
    weights = torch.nn.Parameter(torch.ones(1 << 28, device=device))
    optimizer = torch.optim.SGD([weights], lr=1.0)
    saver = CheckpointSaver(optimizer, device, in_background=True, say=print)
    copies = []
    for number in range(3):
        weights.grad = torch.ones_like(weights)
        torch.cuda.synchronize()
        content = Snapshot({"model": {"weights": weights.detach()}}, {})
        saver.save(content, lambda copy: copies.append(copy.tensors["model"]["weights"].clone()))
        optimizer.step()
        saver.wait()
        torch.cuda.synchronize()
        assert torch.equal(copies[-1], torch.full_like(copies[-1], 1.0 - number))
        assert weights[0].item() == -number
    saver.close()
