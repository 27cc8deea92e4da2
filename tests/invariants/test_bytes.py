"""Bytes a parameter of a full fine-tune with AdamW under autocast, counted at torch's operators."""

import pytest
import torch

from preftune.batching.layout import build_layout
from preftune.config.training import TrainingConfig
from preftune.model.forward import PolicyModel
from preftune.training.optimizer import make_optimizer
from tests.examples import make_examples
from tests.memory import Memory
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("micro_batches", "expected"),
    # With several micro-batches gradients are there while the next one makes its bf16 copy.
    [(2, 18.0), (1, 16.0)],
)
def test_bytes_a_parameter(micro_batches, expected):
    """Few tokens and wide layers: activations are next to nothing."""
    model = tiny_model(hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    policy = PolicyModel(model).train()
    layout = build_layout(make_examples(1, seed=1), "concatenated")
    optimizer = make_optimizer(policy, TrainingConfig())
    forward = torch.autocast("cpu", torch.bfloat16)(policy.forward)
    with Memory() as memory:
        for _ in range(2):  # the second step has optimizer state from its start
            memory.peak = 0
            for _ in range(micro_batches):
                forward(layout).sums.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    count = sum(p.numel() for p in policy.parameters())
    weights = sum(p.nbytes for p in policy.parameters())  # made before the count began
    assert (weights + memory.peak) / count == pytest.approx(expected, rel=0.1)
