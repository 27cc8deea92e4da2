"""What a process takes besides its tensors."""

import os
from pathlib import Path

CUDA_CONTEXT = 640 * 2**20
"""Bytes of a GPU that CUDA, cuBLAS and NCCL take for themselves; assumed, 0.5 to 0.8 GiB is seen."""
SLACK = 0.05
"""Share of tensors that PyTorch's allocator holds beside them on a GPU; assumed."""
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Memory of this process, libraries included, as Linux counts it; 0 elsewhere."""
    if not _STATM.is_file():
        return 0
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
