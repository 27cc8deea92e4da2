"""Rounding to bfloat16 up or down by chance, so that small updates count on average."""

import torch
from torch import Tensor

_ODD = 0x9E3779B9
_LOW = 0xFFFF


class StochasticRounding:
    """Rounds a number to one of its two neighbours, the nearer one more often: right on average.

    bfloat16 has 8 bits: an update below 1/512 of a weight is lost when it is rounded to the nearest
    number. The chance is a hash of seed, weight, place in the weight and step. So there is no
    generator to save, a resumed run draws what it would have drawn, and every rank draws the same
    for the same number, however the weights are cut.
    """

    def __init__(self, seed: int) -> None:
        """Nothing else is kept.

        Args:
            seed: of the run.
        """
        self._seed = seed

    def __call__(self, numbers: Tensor, *, first: int, number: int, step: Tensor) -> Tensor:
        """Rounded to bfloat16.

        Args:
            numbers: fp32.
            first: place of the first of them in the whole weight.
            number: of the weight among all.
            step: device scalar.
        """
        place = torch.arange(numbers.numel(), dtype=torch.int32, device=numbers.device)
        place = place.view(numbers.shape) + _int32(first)
        key = _mixed(step.to(torch.int32) * _int32(_ODD) + _int32(self._seed * 31 + number))
        chance = _mixed(place ^ key) & _LOW
        # The low 16 bits are what bfloat16 lacks: a carry out of them is the next number.
        bits = (numbers.contiguous().view(torch.int32) + chance) & ~_LOW
        return bits.view(torch.float32).bfloat16()


def _mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits in which every bit of the argument reaches every other one.

    Source: the constants of "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018).
    """
    x = (x ^ _shifted(x, 16)) * 0x7FEB352D
    x = (x ^ _shifted(x, 15)) * _int32(0x846CA68B)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _int32(value: int) -> int:
    """The signed number with the same lowest 32 bits."""
    return (value + 2**31) % 2**32 - 2**31
