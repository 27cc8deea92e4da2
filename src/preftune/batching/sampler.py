"""Which rows form each global batch, as a pure function of the step.

There is no state to save or restore: a run that stops after step s goes on with `batch(s)`.
"""

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
