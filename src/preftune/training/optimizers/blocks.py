"""Numbers in 8 or 4 bits: a code each, and a scale for every block of a row.

Blocks lie within rows, so any cut along rows holds whole blocks: an engine may cut the state as it
cuts the weight, and another number of ranks may go on with it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from preftune.distributed.parts import Part

Bits = Literal[4, 8]
BLOCKS: dict[int, tuple[int, ...]] = {8: (256, 128, 64), 4: (128, 64)}
"""Numbers that share a scale: the largest that divides a row."""
FEWEST = 4096
"""Weights of fewer numbers keep their state in fp32, as in bitsandbytes and torchao."""


def block_size(part: Part, bits: Bits) -> int | None:
    """How many numbers of a weight's rows share a scale; None where the state stays in fp32.

    Args:
        part: of the weight.
        bits: of a code.
    """
    row = part.tensor[:1].numel() if part.tensor.ndim > 1 else 0
    if not row or part.shape[0] * row < FEWEST:
        return None
    return next((size for size in BLOCKS[bits] if row % size == 0), None)


@dataclass(frozen=True)
class Codes:
    """The numbers from -1 (or 0) to 1 that codes stand for."""

    bits: Bits
    signed: bool
    """Of means of gradients; else of their squares."""

    def zeros(self, part: Part, block: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of zeros.

        Args:
            part: of the weight.
            block: numbers that share a scale.
        """
        rows, row = len(part.tensor), part.tensor[:1].numel()
        device = part.tensor.device
        codes = torch.zeros(rows, row * self.bits // 8, dtype=torch.uint8, device=device)
        return codes, torch.zeros(rows, row // block, device=device)

    def encoded(self, numbers: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of the nearest numbers that there are codes for.

        Args:
            numbers: rows of fp32.
            block: of them that share a scale.
        """
        blocks = numbers.reshape(len(numbers), -1, block)
        scales = blocks.abs().amax(-1).clamp_min(1e-12)
        codes = _nearest(blocks / scales[..., None], self.bits, self.signed).view(
            numbers.shape[0], -1
        )
        if self.bits == 4:
            codes = codes[:, ::2] << 4 | codes[:, 1::2]
        return codes, scales

    def decoded(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The numbers, row by row.

        Args:
            codes: as `encoded` gave them.
            scales: the same.
        """
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)
        values = _values(self.bits, self.signed, codes.device)
        numbers = values.index_select(0, codes.reshape(-1).int())
        blocks = numbers.view(*scales.shape, -1) * scales[..., None]
        return blocks.view(codes.shape)


def _nearest(numbers: Tensor, bits: Bits, signed: bool) -> Tensor:
    """Codes of the nearest values.

    Looked up by a number's upper 16 bits: numbers that share them lie on the two sides of one edge
    at most, which is then compared with. A tenth of the time of a binary search, on a CPU.
    """
    first, edges = _edges(bits, signed, numbers.device)
    numbers = numbers.reshape(-1)
    cells = (numbers.view(torch.int32) >> 16) & 0xFFFF
    codes = first.index_select(0, cells)
    return codes + (numbers >= edges.index_select(0, codes.int()))


@cache
def _edges(bits: Bits, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The code of the smallest number with the same upper 16 bits; the upper edge of each code."""
    values = _values(bits, signed, torch.device("cpu"))
    edges = (values[1:] + values[:-1]) / 2
    cells = torch.arange(1 << 16, dtype=torch.int32)
    smallest = torch.where(cells >= 1 << 15, 0xFFFF, 0)  # of negative ones, the largest in size
    numbers = (cells << 16 | smallest.int()).view(torch.float32)
    first = torch.bucketize(numbers, edges, right=True).to(torch.uint8)
    return first.to(device), torch.cat([edges, edges.new_tensor([torch.inf])]).to(device)


@cache
def _values(bits: Bits, signed: bool, device: torch.device) -> Tensor:
    """What each code stands for, in ascending order.

    Source: dynamic quantisation, 2110.02861 section 2.1: seven decades, the upper ones with more
    steps. Squares in 4 bits have 16 even steps and no zero, 2309.01507 section 4: they are divided
    by.
    """
    if bits == 4 and not signed:
        return torch.linspace(0, 1, 17)[1:].to(device)
    decades = 7 if bits == 8 else 3
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(decades):
        edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1)
        steps = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade + 1 - decades)
        values += [steps, -steps] if signed else [steps]
    return torch.cat(values).sort().values.to(device)
