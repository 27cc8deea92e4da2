"""A step on a GPU makes the host wait for nothing: CUDA itself raises where it would."""

import pytest
import torch

from preftune.distributed.runtime import Runtime
from preftune.model.forward import PolicyModel
from tests.syncs import take_steps_without_waiting
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    ("max_skipped", "precision", "optimizer"),
    [
        (0, "bf16", "adamw"),
        (3, "bf16", "adamw"),
        (0, "fp16", "adamw"),
        (0, "fp16", "adamw_torch_8bit"),
        (0, "bf16", "adamw_torch_4bit"),
        (0, "bf16", "adafactor"),
        (0, "bf16", "muon"),
    ],
    ids=["stop", "skip_batch", "fp16", "8bit", "4bit", "adafactor", "muon"],
)
def test_a_step_waits_for_nothing(max_skipped, precision, optimizer):
    runtime = Runtime(precision, seed=0)
    policy = PolicyModel(tiny_model(hidden_size=64).to(runtime.device))
    take_steps_without_waiting(policy, runtime, precision, optimizer, max_skipped)
