"""What the machine can do: the rate of its matrix products, and what it is."""

import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPEATS = 5
SECONDS = 0.4
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PACKAGES = ("preftune", "trl", "torch", "transformers", "accelerate", "datasets")
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bf16 operations a second, from the makers' data sheets."""


def measure(hidden: int, intermediate: int) -> dict[str, Any]:
    """Rates of products of fp32 and bf16, operations a second of CPU and of wall time.

    Args:
        hidden: of the model.
        intermediate: of its feed-forward layers: the largest product of the model's own shape.
    """
    return {
        name: {
            "model_shape": _rate(dtype, 2048, hidden, intermediate),
            "square": _rate(dtype, 2048, 2048, 2048),
        }
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }


def _rate(dtype: torch.dtype, rows: int, inner: int, columns: int) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(rows, inner, dtype=dtype, device=device)
    b = torch.randn(inner, columns, dtype=dtype, device=device)
    flops, wall, cpu = 2.0 * rows * inner * columns, [], []
    _products(a, b, 1)
    number = max(1, round(SECONDS / max(_products(a, b, 2)[0] / 2, 1e-6)))
    for _ in range(REPEATS):
        seconds = _products(a, b, number)
        wall.append(number * flops / seconds[0])
        cpu.append(number * flops / seconds[1])
    return {"wall": statistics.median(wall), "cpu": statistics.median(cpu)}


def _products(a: torch.Tensor, b: torch.Tensor, number: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(number):
        a @ b
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, max(time.process_time() - cpu, 1e-9)


def describe() -> dict[str, Any]:
    """The machine and the versions of what runs on it."""
    processor = Path("/proc/cpuinfo").read_text()
    lines = dict(
        (part.strip() for part in line.split(":", 1))
        for line in processor.split("\n\n")[0].splitlines()
        if ":" in line
    )
    flags = set(lines.get("flags", "").split())
    kib = next(
        int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal")
    )
    found: dict[str, Any] = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cpu": lines.get("model name", "unknown"),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "cores": processor.count("processor\t"),
        "memory_gib": round(kib / 2**20, 1),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        found["gpu"] = name
        found["peak_bf16"] = next((f for part, f in PEAK_BF16.items() if part in name), None)
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
