"""Splits by prompt: no prompt has rows on both sides."""

import struct
from collections import Counter
from dataclasses import replace

import xxhash

from preftune.data.pairs import PairDataset, RowCounts, fingerprint
from preftune.errors import DataError


def split_by_prompt(
    dataset: PairDataset, test_size: float | int, seed: int
) -> tuple[PairDataset, PairDataset]:
    """Split off whole prompts until the test side has enough rows.

    Which prompts go depends on the seed and on each prompt alone, not on the order of rows; rows
    keep their order on both sides. Rows dropped at loading are counted on the training side, so
    that the counts of both sides add up to the dataset's.

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
    per_prompt = Counter(example.prompt_key for example in dataset.examples)
    target = _target(dataset.name, test_size, rows)
    if len(per_prompt) < 2:
        raise DataError(
            f"{dataset.name}: {rows} rows on {len(per_prompt)} prompt cannot be split by prompt "
            f"(test_size is {test_size}); give a separate test set, or more prompts"
        )
    chosen: set[int] = set()
    held_out = 0
    # The last prompt stays for training.
    for key in sorted(per_prompt, key=lambda key: _rank(seed, key))[:-1]:
        if held_out >= target:
            break
        chosen.add(key)
        held_out += per_prompt[key]
    if isinstance(test_size, int) and held_out < target:
        raise DataError(
            f"{dataset.name}: test_size {test_size} of {rows} rows leaves no whole prompt for "
            f"training ({len(per_prompt)} prompts); the most this split can take is {held_out}"
        )
    return _side(dataset, chosen, test=False), _side(dataset, chosen, test=True)


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


def _rank(seed: int, key: int) -> tuple[int, int]:
    return xxhash.xxh3_64_intdigest(struct.pack("<qQ", seed, key)), key


def _side(dataset: PairDataset, test_keys: set[int], *, test: bool) -> PairDataset:
    examples = tuple(e for e in dataset.examples if (e.prompt_key in test_keys) == test)
    row_ids = frozenset(e.row_id for e in examples)
    cut = row_ids & dataset.truncated_row_ids
    whole = dataset.counts
    counts = RowCounts(
        read=len(examples) if test else len(examples) + whole.read - whole.kept,
        kept=len(examples),
        dropped={} if test else dict(whole.dropped),
        truncated=len(cut),
        dropped_rows=() if test else whole.dropped_rows,
    )
    return replace(
        dataset,
        examples=examples,
        counts=counts,
        fingerprint=fingerprint(examples),
        text_row_ids=row_ids & dataset.text_row_ids,
        truncated_row_ids=cut,
    )
