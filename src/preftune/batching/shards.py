"""Which tokens of a packed row a process computes, where several share the row."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class RowPart(NamedTuple):
    """A process among those that share each row."""

    rank: int
    size: int
    """How many share it."""


@dataclass(frozen=True)
class Shard:
    """The tokens of a packed row that one process computes.

    Tokens are dealt in turn: token t lies on process `t mod size`. Linear layers and the head then
    have equally much to do everywhere, because scored tokens come in runs. The row is filled up
    with tokens that nobody sees.

    Example: the row `[5 6 7 8 9]` at positions `[0 1 2 3 2]` on the second of two processes, where
    position 1 predicts the tokens 7 and 9, 2 predicts 8:

        input_ids        [[6, 8, 0]]
        position_ids     [[1, 3, 3]]
        real             [True, True, False]
        score_positions  [0, 0]             # of the labels 7 and 9
        scored           [0, 2]
    """

    input_ids: Int[Tensor, "1 tokens"]
    position_ids: Int[Tensor, "1 tokens"]
    real: Bool[Tensor, " tokens"]
    """Which tokens are no filling."""
    score_positions: Int[Tensor, " scored_here"]
    """Which of these tokens predicts each label that is predicted here."""
    scored: Int[Tensor, " scored_here"]
    """Which labels those are, of all the row's."""


def make_shard(
    input_ids: Int[Tensor, "1 width"],
    position_ids: Int[Tensor, "1 width"],
    score_positions: Int[Tensor, " scored"],
    part: RowPart,
    *,
    same_longest: bool = False,
) -> Shard:
    """Cut out the part of one process.

    Args:
        input_ids: of the whole row.
        position_ids: of the whole row.
        score_positions: token of the row that predicts each label.
        part: which process, of how many.
        same_longest: let every process see the row's last position, by filling for each: for
            models whose rotary frequencies depend on the longest sequence of a call.
    """
    width = input_ids.shape[1]
    rounds = -(-width // part.size) + same_longest
    filling = rounds * part.size - width

    def dealt(row: Tensor, fill: int) -> Tensor:
        filled = torch.cat((row, row.new_full((filling,), fill)))
        return filled.view(rounds, part.size)[:, part.rank].contiguous()

    here = score_positions % part.size == part.rank
    return Shard(
        dealt(input_ids[0], 0).unsqueeze(0),
        dealt(position_ids[0], int(position_ids.max())).unsqueeze(0),
        dealt(torch.ones(width, dtype=torch.bool), False),
        score_positions[here] // part.size,
        here.nonzero().flatten(),
    )
