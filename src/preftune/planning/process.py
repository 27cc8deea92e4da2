"""What a process takes besides its tensors."""

import os
from pathlib import Path

import torch
from torch import nn

CUDA_CONTEXT = 640 * 2**20
"""Bytes of a GPU that CUDA, cuBLAS and NCCL take for themselves; assumed (0.5 to 0.8 GiB)."""
GPU_SLACK = 0.05
"""Share of tensors that PyTorch's allocator holds beside them on a GPU; assumed."""
HEAP_SLACK = 0.1
"""Share of what a step makes that glibc's heap holds beside it: blocks below 32 MiB are not given
back while something lies above them. Measured, see docs/planning.md."""
START_LEFT = 160 * 2**20
"""Bytes that loading, probing and scoring leave on the heap and in libraries of a CPU's process
before the first step. Chosen from logs of three runs, which had 140 to 400 MiB of it."""
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Memory of this process, libraries included, as Linux counts it; 0 elsewhere."""
    if not _STATM.is_file():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def working_bytes(products: torch.dtype | None) -> int:
    """The same after a small computation, and with what a run's start leaves behind.

    Args:
        products: the type of products, where it is not fp32.
    """
    layer = nn.Linear(512, 512)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with torch.autocast("cpu", products or torch.bfloat16, enabled=products is not None):
        layer(torch.zeros(256, 512)).sum().backward()
    optimizer.step()
    return resident_bytes() + START_LEFT


def mapped_bytes(model: Path) -> int:
    """Bytes of a model's files that a process maps into its memory.

    Args:
        model: its folder; 0 where it is none.
    """
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
