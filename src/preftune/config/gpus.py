"""Common GPUs: memory that programs see, and peak rates of dense products in 16 bits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One kind of GPU."""

    memory_gib: float
    """What the driver shows, in GiB of 2^30 bytes; vendors name GB of 10^9."""
    teraflops: float
    """Peak of bf16 (fp16 where there is none) products with fp32 sums, without sparsity; from the
    vendor's data sheet."""
    has_bf16: bool = True
    """In hardware; with it come the fused kernels of attention, too."""


GPUS: dict[str, GPU] = {
    "T4": GPU(15.0, 65, has_bf16=False),
    "A10G": GPU(22.5, 70),
    "L4": GPU(22.5, 121),
    "RTX-3090": GPU(24.0, 71),
    "RTX-4090": GPU(24.0, 165),
    "RTX-5090": GPU(31.8, 210),
    "A100-40": GPU(40.0, 312),
    "L40S": GPU(45.0, 362),
    "A100-80": GPU(80.0, 312),
    "H100": GPU(79.6, 989),
    "H200": GPU(140.4, 989),
    "B200": GPU(179.0, 2250),
    "MI300X": GPU(192.0, 1307),
}


def known_gpu(name: str) -> GPU | None:
    """A GPU by its name, written in any case and with spaces or dashes; None if it is not known.

    Example: "rtx 4090".
    """
    plain = {_plain(key): gpu for key, gpu in GPUS.items()}
    return plain.get(_plain(name))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
