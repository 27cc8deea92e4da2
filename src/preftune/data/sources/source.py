"""What a dataset is to the rest of preftune: rows that can be read again, and who they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

RawRow: TypeAlias = tuple[str, dict[str, Any]]
"""Row id and columns."""


@dataclass(frozen=True, slots=True)
class Source:
    """One split of one dataset, found and identified, not yet read."""

    name: str
    """As the user wrote it."""
    split: str
    revision: str | None
    """The commit of a Hub dataset, else None."""
    fingerprint: str
    """xxh3_128, in hex, of the content: of each file its name and bytes, in order, in whatever
    folder; of a Hub dataset id, subset, split, commit and number of rows."""
    total: int | None
    """How many rows, where that is known without parsing them."""
    reader: Callable[[], Iterator[RawRow]] = field(repr=False, compare=False)
    """What `rows` calls."""

    def rows(self) -> Iterator[RawRow]:
        """Read from the first row on, the same rows in the same order at every call.

        Memory holds a few rows at a time, however large the dataset is.

        Raises:
            DataError: while reading, at a file without rows or a row that cannot be read.
        """
        return self.reader()
