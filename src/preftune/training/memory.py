"""How much memory is used, and what to say when there is not enough of it."""

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from preftune.batching.layout import PairLayout
from preftune.errors import ConfigError

GIB = 2**30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CPU_ALLOCATOR = ("DefaultCPUAllocator", "not enough memory", "std::bad_alloc")
_CUDA_LIBRARIES = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: allocated on a GPU, resident of the process on a CPU; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_memory_gib(device: torch.device) -> float:
    """What a process may use at most: a GPU's memory, or the machine's within its limits; GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    if _CGROUP_LIMIT.is_file() and (text := _CGROUP_LIMIT.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits) / GIB


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, PyTorch or a CUDA library is one of these."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = (*_CPU_ALLOCATOR, *_CUDA_LIBRARIES)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


@contextmanager
def explain_lack_of_memory(
    stage: str,
    device: torch.device,
    work: Callable[[], str],
    remedies: Callable[[], Sequence[str]],
    *,
    then: str = "",
) -> Iterator[None]:
    """Turn a lack of memory inside the block into an error that says what to change.

    Args:
        stage: what was being done.
        device: where.
        work: what was to fit, with its tokens and rows; asked only if it did not.
        remedies: options with values, the best one first; asked only then, too.
        then: what becomes of what is done already.

    Raises:
        ConfigError: memory does not suffice.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    else:
        return
    # Raised here, where the frames of the failed work, and the tensors they hold, are gone.
    raise ConfigError(
        f"out of memory: {work()} does not fit into the memory of {device}, {stage}: {reason}. "
        f"At most {peak_memory_gib(device):.1f} GiB were used so far, and there are "
        f"{device_memory_gib(device):.1f} GiB. Set {', or '.join(remedies())}{then}"
    )


def num_positions_of(layout: PairLayout) -> int:
    """Token positions of a micro-batch, padding included."""
    return sum(block.input_ids.numel() for block in layout.blocks)


def rows_and_tokens(num_rows: int, positions: int) -> str:
    """A micro-batch, for people."""
    return f"{num_rows} row{'s' if num_rows != 1 else ''}, {positions} tokens"


def training_remedies(num_rows: int, positions: int, accumulation: int = 1) -> list[str]:
    """Options that make a training micro-batch smaller, or what is kept of it.

    Args:
        num_rows: of the micro-batch that did not fit.
        positions: of its tokens.
        accumulation: `gradient_accumulation_steps` of the run.
    """
    checkpointing = "--gradient_checkpointing true"
    if num_rows < 2:
        return [checkpointing, "a lower --max_length"]
    return [
        f"--max_tokens_per_microbatch {positions // 2} (the steps stay the same)",
        f"--per_device_train_batch_size {-(-num_rows // 2)} with "
        f"--gradient_accumulation_steps {2 * accumulation}",
        checkpointing,
    ]


def scoring_remedies(num_rows: int, positions: int) -> list[str]:
    """Options that make a micro-batch without gradient smaller."""
    if num_rows < 2:
        return ["a lower --max_length", "--dtype bfloat16"]
    return [
        f"--per_device_eval_batch_size {num_rows // 2}",
        f"--max_tokens_per_microbatch {positions // 2}",
    ]
