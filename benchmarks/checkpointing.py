"""What checkpointing keeps, by the number of layers: every layer a segment, or segments of sqrt(L).

    python benchmarks/checkpointing.py

Counted as `preftune plan` counts, on tensors without numbers: layers of SmolLM2-135M, one row of
1,024 tokens, bf16 products over fp32 weights, forward and backward of the layers alone.
"""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from preftune.planning.live import LiveBytes

TOKENS, WIDTH = 1024, 576
DEPTHS = (4, 9, 16, 25, 36)


class Layer(nn.Module):
    """A layer that takes and gives hidden states alone."""

    def __init__(self, config: LlamaConfig, number: int) -> None:
        """One of the stack."""
        super().__init__()
        self.layer = LlamaDecoderLayer(config, number)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """Without mask: causal attention."""
        positions = torch.arange(hidden.shape[1]).unsqueeze(0)
        return self.layer(hidden, position_embeddings=self.rotary(hidden, positions))


def kept(depth: int, run: Callable[[nn.Sequential, Tensor], Tensor]) -> int:
    """Bytes of activations at their most, without weights, their copies and gradients."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=depth,
        num_attention_heads=9,
        num_key_value_heads=3,
        attn_implementation="sdpa",
    )
    live = LiveBytes()
    with FakeTensorMode():
        stack = nn.Sequential(*(Layer(config, i) for i in range(depth)))
        live.hold("weights", [*stack.parameters(), *stack.buffers()])
        with live, torch.autocast("cpu", torch.bfloat16):
            hidden = torch.zeros(1, TOKENS, WIDTH).requires_grad_()
            run(stack, hidden).sum().backward()
        live.name("gradients", [p.grad for p in stack.parameters() if p.grad is not None])
    return live.peak(without=("weights", "weight copies", "gradients")).get("activations", 0)


def by_layer(stack: nn.Sequential, hidden: Tensor) -> Tensor:
    """As transformers does it."""
    for layer in stack:
        hidden = checkpoint(layer, hidden, use_reentrant=False)  # pyright: ignore
    return hidden


def by_segments(stack: nn.Sequential, hidden: Tensor) -> Tensor:
    """Segments of sqrt(L) layers."""
    return checkpoint_sequential(stack, isqrt(len(stack)), hidden, use_reentrant=False)


def main() -> None:
    """Print a row for each number of layers."""
    mib = 2**20
    print("| layers | all kept, MiB | every layer | segments of sqrt(L) | L inputs |")
    print("|---|---|---|---|---|", flush=True)
    for depth in DEPTHS:
        sizes = [kept(depth, run) for run in (lambda s, h: s(h), by_layer, by_segments)]
        cells = " | ".join(f"{size / mib:.0f}" for size in sizes)
        print(f"| {depth} | {cells} | {depth * TOKENS * WIDTH * 4 / mib:.0f} |", flush=True)


if __name__ == "__main__":
    main()
