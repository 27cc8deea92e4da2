"""Proofs counted over rows, which are read again from their source."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from preftune.data.pairs import PairDataset
from preftune.data.proofs import Proofs, Prover
from preftune.data.reasons import Dropped
from preftune.data.sources import Source
from preftune.data.tokenized import Recipe
from preftune.errors import DataError
from preftune.schema import Example

MEANING = {
    "prefix": "the prompt's own tokens begin every sequence",
    "bos": "the tokenizer's BOS, if any, stands once, at the start",
    "stop": "every assistant's turn ends with the stop token and holds it nowhere else",
    "round_trip": "tokens decode to the text that the template writes",
    "verbatim": "trained tokens are the answer as it is in the data, and its stop token",
}
"""What each proof says of a row, before any cut."""
NUM_IDS = 5


@dataclass(frozen=True)
class ProofCounts:
    """For how many rows each proof holds."""

    num_rows: int
    """Rows that were proved."""
    of_rows: int
    """Rows of the dataset."""
    held: dict[str, int]
    """Name of a proof -> rows."""
    failing: dict[str, tuple[str, ...]]
    """Name of a proof -> ids of the first `NUM_IDS` rows for which it does not hold."""


def rows_to_prove(num_rows: int, most: int, seed: int) -> np.ndarray:
    """All rows, or `most` of them drawn by a seed, in order."""
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, most, replace=False))


def count_proofs(
    dataset: PairDataset,
    rows: np.ndarray,
    recipe: Recipe,
    update: Callable[[int], None] = lambda done: None,
) -> ProofCounts:
    """Prove rows as they were before any cut; memory holds a few at a time.

    Args:
        dataset: as `load_pairs` gives it.
        rows: which of its rows, in order.
        recipe: by which it was tokenised.
        update: called after each row with the number of rows done.

    Raises:
        DataError: the source is no longer what was tokenised.
    """
    prove = Prover(recipe.tokenizer)
    names = [field.name for field in fields(Proofs)]
    held = dict.fromkeys(names, 0)
    failing: dict[str, list[str]] = {name: [] for name in names}
    done = 0
    for origin in range(len(dataset.opened)):
        of_source = rows[dataset.examples.origins[rows] == origin]
        for index, example in _read_again(dataset, origin, of_source, recipe):
            proofs = prove(example, dataset.examples.whole(index))
            for name in names:
                if getattr(proofs, name):
                    held[name] += 1
                elif len(failing[name]) < NUM_IDS:
                    failing[name].append(example.row_id)
            done += 1
            update(done)
    first = {name: tuple(ids) for name, ids in failing.items()}
    return ProofCounts(done, len(dataset.examples), held, first)


def _parsed_again(
    source: Source, recipe: Recipe, wanted: Container[int]
) -> Iterator[tuple[int, Example | Dropped | None]]:
    """Number in the table, and text, of each row that is wanted; of the others None may stand."""
    number = 0
    for row_id, raw in source.rows():
        # How many rows pairs become is not known before they are read.
        rows: Sequence[Example | Dropped | None] = [None]
        if recipe.kind == "labelled" or number in wanted:
            rows = recipe.parse(row_id, raw, source.name)
        yield from enumerate(rows, start=number)
        number += len(rows)


def _read_again(dataset: PairDataset, origin: int, rows: np.ndarray, recipe: Recipe):
    """Each of `rows`, all of one source, with its text, in the order of the source."""
    source, examples = dataset.opened[origin], dataset.examples
    number_of = dict(
        zip(
            (examples.positions[rows] - examples.starts[origin]).tolist(),
            rows.tolist(),
            strict=True,
        )
    )
    if not number_of:
        return
    last = max(number_of)
    for number, example in _parsed_again(source, recipe, number_of):
        if number in number_of:
            index = number_of.pop(number)
            if not isinstance(example, Example) or examples.whole(index).row_id != example.row_id:
                break
            yield index, example
        if number == last:
            break
    if number_of:
        raise DataError(
            f"{source.name}: the rows are not those that were tokenised; the data, or a transform, "
            "changes while it is read: run again once it is at rest"
        )
