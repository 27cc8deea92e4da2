"""Splits by prompt: no prompt has rows on both sides."""

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xxhash

from preftune.data.pairs import PairDataset
from preftune.data.reasons import DropReason
from preftune.errors import DataError


def split_by_prompt(
    dataset: PairDataset, test_size: float | int, seed: int
) -> tuple[PairDataset, PairDataset]:
    """Split off whole prompts until the test side has enough rows.

    Which prompts go depends on the seed and on each prompt alone, not on the order of rows; rows
    keep their order on both sides. Rows dropped at loading are counted on the training side, so
    that the counts of both sides add up to the dataset's. Rows that a mixer repeats stand once on
    the test side.

    Args:
        dataset: loaded pairs.
        test_size: a fraction of the rows strictly between 0 and 1 (at least one row), or a number
            of rows. Prompts have several rows, so the test side may have a few more; it has fewer
            only where a fraction would leave no prompt for training.
        seed: of the choice.

    Returns:
        The training side and the test side.

    Raises:
        DataError: a size out of range, or too few prompts to have one on each side.
    """
    rows = len(dataset.examples)
    keys, per_prompt = np.unique(dataset.examples.prompt_keys, return_counts=True)
    target = _target(dataset.name, test_size, rows)
    if len(keys) < 2:
        raise DataError(
            f"{dataset.name}: {rows} rows on {len(keys)} prompt cannot be split by prompt "
            f"(test_size is {test_size}); give a separate test set, or more prompts"
        )
    ranks = np.array([_rank(seed, int(key)) for key in keys], dtype=np.uint64)
    order = np.argsort(ranks, kind="stable")
    # The last prompt stays for training.
    held_out = np.cumsum(per_prompt[order])[:-1]
    num_prompts = min(int(np.searchsorted(held_out, target)) + 1, len(held_out))
    if isinstance(test_size, int) and held_out[-1] < target:
        raise DataError(
            f"{dataset.name}: test_size {test_size} of {rows} rows leaves no whole prompt for "
            f"training ({len(keys)} prompts); the most this split can take is {held_out[-1]}"
        )
    is_test = np.isin(dataset.examples.prompt_keys, keys[order[:num_prompts]])
    test = replace(_side(dataset, is_test), copies=None, sources=())
    whole = dataset.counts
    test_counts = replace(
        test.counts, read=len(test.examples), dropped={}, dropped_rows=(), not_drawn=0
    )
    train = _side(dataset, ~is_test)
    train_counts = replace(train.counts, read=whole.read - len(test.examples))
    return replace(train, counts=train_counts), replace(test, counts=test_counts)


def without_prompts_of(dataset: PairDataset, held_out: Sequence[PairDataset]) -> PairDataset:
    """Leave out the rows whose prompt a held-out set has, and count them.

    Raises:
        DataError: no row is left.
    """
    shared = shares_prompt(dataset, held_out)
    if not shared.any():
        return dataset
    names = ", ".join(other.name for other in held_out)
    if shared.all():
        raise DataError(
            f"{dataset.name}: all of its {len(shared)} prompts are in eval_dataset ({names}) too, "
            "and what is evaluated is not trained on; give other pairs, or hold some out with "
            "test_size"
        )
    kept = _side(dataset, ~shared)
    dropped = kept.counts.dropped | {DropReason.PROMPT_HELD_OUT.value: int(shared.sum())}
    return replace(kept, counts=replace(kept.counts, dropped=dropped))


def shares_prompt(dataset: PairDataset, others: Sequence[PairDataset]) -> np.ndarray:
    """(rows,) Which rows have a prompt that one of `others` has."""
    keys = [np.empty(0, np.uint64), *(other.examples.prompt_keys for other in others)]
    return np.isin(dataset.examples.prompt_keys, np.concatenate(keys))


def _target(name: str, test_size: float | int, rows: int) -> int:
    if isinstance(test_size, bool) or not isinstance(test_size, int | float):
        raise DataError(f"{name}: test_size is {test_size!r}; give a fraction or a number of rows")
    if isinstance(test_size, int):
        if not 1 <= test_size < rows:
            raise DataError(
                f"{name}: test_size is {test_size} rows, and there are {rows}; choose from 1 to "
                f"{rows - 1}, or a fraction between 0 and 1"
            )
        return test_size
    if not 0 < test_size < 1:
        raise DataError(
            f"{name}: test_size is {test_size}; a fraction lies strictly between 0 and 1, and a "
            "number of rows is written without a decimal point"
        )
    return max(1, round(test_size * rows))


def _rank(seed: int, key: int) -> int:
    """Where a prompt stands in the order in which prompts are held out."""
    return xxhash.xxh3_64_intdigest(struct.pack("<qQ", seed, key))


def _side(dataset: PairDataset, chosen: np.ndarray) -> PairDataset:
    side = dataset.take(np.flatnonzero(chosen))
    cut = int(side.examples.is_cut.sum())
    counts = replace(dataset.counts, kept=len(side.examples), truncated=cut)
    return replace(side, counts=counts)
