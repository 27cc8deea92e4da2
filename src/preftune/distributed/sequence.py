"""Several processes to a row: what those of a group exchange, with its gradient.

Each holds some tokens of a packed row; attention alone looks across tokens. There the processes
exchange tokens for heads: each gets all tokens of some heads, computes their attention, and gives
every process its tokens' share of the result (DeepSpeed-Ulysses, Jacobs et al. 2023,
arXiv:2309.14509).

What is computed of a whole row is equal on all processes of its group. So one of them may count
it, and the gradient of each goes back through its own tokens alone: the sum of the parameters'
gradients over the group is that of the row.
"""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from preftune.errors import ConfigError


def num_groups(world_size: int, sequence_parallel_size: int) -> int:
    """How many groups work side by side, each on rows of its own.

    Args:
        world_size: number of processes.
        sequence_parallel_size: processes of a group.

    Raises:
        ConfigError: the processes do not make whole groups.
    """
    groups, left = divmod(world_size, sequence_parallel_size)
    if left or not groups:
        processes = "1 process runs" if world_size == 1 else f"{world_size} processes run"
        raise ConfigError(
            f"sequence_parallel_size is {sequence_parallel_size}, and {processes}; start a "
            "multiple of it, or set it to a divisor of their number"
        )
    return groups


class SequenceGroup:
    """The processes that share each row: as many consecutive ranks as a group has."""

    def __init__(self, size: int, timeout: timedelta) -> None:
        """Form the groups; every process of the run calls this.

        Args:
            size: processes of a group; it divides their number.
            timeout: how long one waits for another.
        """
        self._group, _ = dist.new_subgroups(size, timeout=timeout)
        self.rank = dist.get_rank() % size
        self.size = size

    def __deepcopy__(self, memo: Any) -> "SequenceGroup":
        """The same group: a copy of a model runs on the same processes."""
        return self

    def to_heads(self, tensors: Sequence[Tensor], num_tokens: int) -> list[Tensor]:
        """From all heads of some tokens to some heads of all tokens.

        Heads that are fewer than the processes, or no multiple, are repeated as often as it takes:
        keys and values that several heads of queries share.

        Args:
            tensors: (1, heads, own tokens, dim) each, of one dtype; dealt as `Shard` says.
            num_tokens: of the row, without what fills it up.

        Returns:
            (1, heads / size, num_tokens, dim) each, in the order of the row.
        """
        size = self.size
        tensors = [
            tensor.repeat_interleave(size // math.gcd(tensor.shape[1], size), dim=1)
            for tensor in tensors
        ]
        # One exchange for all: (size, what goes to each).
        flat = [tensor.reshape(size, -1) for tensor in tensors]
        arrived = self._exchange(torch.cat(flat, dim=1)).split([f.shape[1] for f in flat], dim=1)
        rows = []
        for tensor, values in zip(tensors, arrived, strict=True):
            heads, own, dim = tensor.shape[1] // size, tensor.shape[2], tensor.shape[3]
            # From (from whom, heads, round, dim): a round after the other deals a token to each.
            in_order = values.view(size, heads, own, dim).permute(1, 2, 0, 3)
            rows.append(in_order.reshape(1, heads, own * size, dim)[:, :, :num_tokens])
        return rows

    def to_tokens(self, tensor: Tensor, num_own: int) -> Tensor:
        """The way back: from some heads of all tokens to all heads of some tokens.

        Args:
            tensor: (1, tokens, heads / size, dim).
            num_own: tokens that each process has, with what fills up.

        Returns:
            (1, num_own, heads, dim).
        """
        size = self.size
        tokens, heads, dim = tensor.shape[1:]
        filled = torch.nn.functional.pad(tensor[0], (0, 0, 0, 0, 0, num_own * size - tokens))
        dealt = filled.view(num_own, size, heads, dim).transpose(0, 1)
        arrived = self._exchange(dealt.contiguous()).transpose(0, 1)
        return arrived.reshape(1, num_own, size * heads, dim)

    def own_heads(self, values: Tensor) -> Tensor:
        """The entries of (heads,) values that `to_heads` brings here."""
        return values.chunk(self.size)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the group, on every process; its gradient goes to each process' own part."""
        return _Total.apply(tensor, self._group)  # type: ignore[no-any-return]

    def _exchange(self, tensor: Tensor) -> Tensor:
        return _Exchange.apply(tensor, self._group)  # type: ignore[no-any-return]


class _Exchange(torch.autograd.Function):
    """Entry i goes to process i, whose own comes in its place; so it is with gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        arrived = torch.empty_like(tensor)
        dist.all_to_all_single(arrived, tensor, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = grads[0].contiguous()
        arrived = torch.empty_like(gradient)
        dist.all_to_all_single(arrived, gradient, group=ctx.group)
        return arrived, None


class _Total(torch.autograd.Function):
    """All-reduce. The loss that follows is the same on all processes and counts once."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return grads[0], None
