"""Which other row's answer each row is compared with."""

import numpy as np


def mismatched_rows(prompts: np.ndarray, positions: np.ndarray, seed: int) -> np.ndarray | None:
    """(rows,) Of each row, the next one in a shuffled circle that is another's.

    Args:
        prompts: (rows,) keys of prompts; another's is one with another prompt.
        positions: (rows,) of rows in the table: what tells them apart if all have one prompt.
        seed: of the shuffling.

    Returns:
        Row indices; None where all rows are one.
    """
    order = np.random.default_rng(seed).permutation(len(prompts))
    for keys in (prompts[order], positions[order]):
        # Where the circle changes from one key to the next, which is that of a whole run of rows.
        starts = np.flatnonzero(keys != np.roll(keys, 1))
        if len(starts):
            after = np.searchsorted(starts, np.arange(len(keys)), side="right")
            partners = np.empty_like(order)
            partners[order] = order[starts[after % len(starts)]]
            return partners
    return None
