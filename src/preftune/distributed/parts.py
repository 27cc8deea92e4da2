"""What one rank holds of a tensor that is cut over several."""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Part:
    """A rank's rows of a tensor."""

    tensor: Tensor
    """The rows; of a tensor without dimensions, the tensor."""
    first: int
    """Number of the first of them in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole."""
    is_saved: bool = True
    """Whether a checkpoint takes it from this rank: one of those that hold the same."""


def whole_part(tensor: Tensor, rank: int) -> Part:
    """Of a tensor that every rank holds; rank 0's is saved."""
    return Part(tensor, 0, tuple(tensor.shape), rank == 0)


def cut(tensor: Tensor, rank: int, num_ranks: int) -> Part:
    """A rank's rows of a tensor that it has whole; rank 0 has those without dimensions.

    Args:
        tensor: the same on all ranks.
        rank: this one.
        num_ranks: among which to cut.
    """
    if tensor.ndim == 0:
        return whole_part(tensor, rank)
    rows = rows_of_rank(len(tensor), rank, num_ranks)
    return Part(tensor[rows.start : rows.stop], rows.start, tuple(tensor.shape))


def rows_of_rank(num_rows: int, rank: int, num_ranks: int) -> range:
    """Rows that a rank gets of a tensor, cut as PyTorch cuts: equally many but for the last ones.

    Args:
        num_rows: of the whole tensor.
        rank: whose.
        num_ranks: among which it is cut.
    """
    most = -(-num_rows // num_ranks)
    return range(min(rank * most, num_rows), min((rank + 1) * most, num_rows))


def part_of(tensor: Tensor, rank: int) -> Part:
    """What this rank holds of a tensor: its rows of a `DTensor`, in place; else all of it.

    Args:
        tensor: a `DTensor` cut along its first dimension, or a plain tensor, the same on all ranks.
        rank: this one.
    """
    if not isinstance(tensor, DTensor):
        return whole_part(tensor, rank)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None  # every rank is in the mesh
    first, is_saved = 0, True
    for at, size, placement in zip(
        coordinate, tensor.device_mesh.shape, tensor.placements, strict=True
    ):
        if isinstance(placement, Shard):
            assert placement.dim == 0
            first = rows_of_rank(tensor.shape[0], at, size).start
        elif at:
            is_saved = False
    return Part(tensor.to_local(), first, tuple(tensor.shape), is_saved)


def part_beside(value: Tensor, parameter: Tensor, rank: int) -> Part:
    """What this rank holds of a state whose rows are those of a parameter.

    Args:
        value: a number, or rows as many as this rank has of the parameter.
        parameter: cut over ranks, or whole.
        rank: this one.
    """
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor) or value.ndim == 0:
        return part_of(value, rank)
    own = part_of(parameter.detach(), rank)
    return Part(value, own.first, (own.shape[0], *value.shape[1:]), own.is_saved)
