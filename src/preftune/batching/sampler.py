"""Which rows form each global batch, as a pure function of the step.

There is no state to save or restore: a run that stops after step s goes on with `batch(s)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class PairSampler:
    """Deals every row once an epoch, in an order that the seed alone decides.

    Args:
        num_pairs: rows in the dataset, at least 1.
        global_batch_size: rows an optimizer step reads over all ranks; the last batch of an epoch
            may be shorter and is never dropped or filled up.
        seed: seeds the order; neither world size nor micro-batch size changes it.
        shuffle: False keeps the order of the dataset in every epoch.
    """

    num_pairs: int
    global_batch_size: int
    seed: int
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""
        return -(-self.num_pairs // self.global_batch_size)

    def batch(self, step: int) -> list[int]:
        """Row indices of the global batch of `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = within * self.global_batch_size
        if not self.shuffle:
            return list(range(start, min(start + self.global_batch_size, self.num_pairs)))
        return _permutation(self.num_pairs, self.seed, epoch)[
            start : start + self.global_batch_size
        ].tolist()

    def epoch_at(self, step: int) -> float:
        """Passes over the data completed after `step` optimizer steps, counted in rows."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch + within * self.global_batch_size / self.num_pairs


@lru_cache(maxsize=2)
def _permutation(num_pairs: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


def split_micro_batches(
    batch: Sequence[int], micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """One rank's share of a global batch, cut into micro-batches.

    Every rank gets the same number of micro-batches, because collectives must match; a rank with
    fewer rows gets empty ones at the end.

    Args:
        batch: row indices of the global batch.
        micro_batch_size: most rows in a micro-batch.
        rank: this process.
        world_size: number of processes.

    Returns:
        Lists of row indices, in forward order.
    """
    most_rows = -(-len(batch) // world_size)
    num_micro_batches = -(-most_rows // micro_batch_size)
    mine = list(batch[rank::world_size])
    return [
        mine[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_micro_batches)
    ]


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row indices in batches of similar length.

    Longest first, so that a lack of memory shows at once. A pure function of the lengths; ties
    keep the order of the rows.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices in padded batches of at most `max_tokens` tokens, longest first.

    A pure function of the lengths. A row longer than the budget stands alone.

    Args:
        lengths: tokens of each row.
        max_tokens: most tokens of a batch, padding included: rows x longest row.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
