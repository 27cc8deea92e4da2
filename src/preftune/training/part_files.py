"""Tensors that lie in several files, read into what one rank holds of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from preftune.distributed.parts import Part
from preftune.training.tensor_files import Damaged, differing, first_rows


@dataclass
class _Found:
    shape: tuple[int, ...] = ()
    """Of the whole tensor, as far as its files have been seen."""
    rows: int = 0
    """Rows that were put into the target."""


@dataclass
class PartReader:
    """Reads files of any number of ranks, whole tensors too, into parts of any other cut."""

    targets: Mapping[str, Part]
    """Filled in place."""
    _found: dict[str, _Found] = field(default_factory=dict)

    def read(self, paths: Iterable[Path]) -> None:
        """Read every file, and see that together they hold the targets.

        Args:
            paths: of safetensors files.

        Raises:
            Damaged: one cannot be read, or rows are missing.
        """
        for path in paths:
            try:
                self._read(path)
            except (SafetensorError, ValueError) as error:
                raise Damaged(f"{path.name} cannot be read ({error})") from error
        for name, found in self._found.items():
            wanted = self.targets.get(name)
            if wanted is not None and found.shape == wanted.shape:
                rows = len(wanted.tensor) if wanted.shape else 1
                if found.rows != rows:
                    raise Damaged(f"{found.rows} of the {rows} rows of {name} are there")

    @property
    def other(self) -> list[str]:
        """Names that stand in only one of files and targets, or whose shapes differ."""
        shapes = {name: found.shape for name, found in self._found.items()}
        wanted = {name: part.shape for name, part in self.targets.items()}
        return differing(shapes, wanted)

    @torch.no_grad()
    def _read(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            firsts = first_rows(file.metadata())
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                piece = file.get_slice(name)
                shape, first = tuple(piece.get_shape()), firsts.get(name, 0)
                found = self._found.setdefault(name, _Found(shape))
                if shape:
                    most = max(found.shape[0], first + shape[0])
                    found.shape = (most, *shape[1:])
                target = self.targets.get(name)
                if target is None or target.shape[1:] != shape[1:]:
                    continue
                if not shape:
                    target.tensor.copy_(file.get_tensor(name))
                    found.rows = 1
                    continue
                start = max(first, target.first)
                stop = min(first + shape[0], target.first + len(target.tensor))
                if start < stop:
                    rows = target.tensor[start - target.first : stop - target.first]
                    rows.copy_(piece[start - first : stop - first])
                    found.rows += stop - start
