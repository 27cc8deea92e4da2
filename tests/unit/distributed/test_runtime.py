"""What `mixed_precision` stands for on a device."""

import pytest
import torch
from torch import Tensor, nn

from preftune.distributed.runtime import AUTOCAST, Precision, Runtime, resolve_precision


@pytest.mark.parametrize(
    ("has_cuda", "has_bf16", "expected"),
    [
        (True, True, "bf16"),
        (True, False, "fp16"),  # compute capability below 8.0
        (False, True, "bf16"),
        (False, False, "fp32"),
    ],
)
def test_auto_is_what_the_device_computes_fast(monkeypatch, has_cuda, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    assert resolve_precision("auto") == expected
    assert [resolve_precision(choice) for choice in AUTOCAST] == list(AUTOCAST)


class Scores(nn.Module):
    """The type that a product comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> torch.dtype:
        """Of one product."""
        return self.linear(x).dtype


@pytest.mark.parametrize("precision", list(AUTOCAST))
def test_a_prepared_model_computes_in_it_until_it_is_released(precision: Precision):
    runtime, model, x = Runtime(precision, seed=0), Scores(), torch.ones(1, 2)
    for _ in range(2):
        runtime.prepare_for_inference(model)
    assert model(x) == (AUTOCAST[precision] or torch.float32)
    runtime.release(model)
    assert model(x) == torch.float32
