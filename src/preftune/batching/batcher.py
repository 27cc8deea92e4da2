"""From row indices to what one forward reads, on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from preftune.batching.layout import Layout, PairLayout, build_layout
from preftune.schema import TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a dataset, laid out for one forward."""

    layout: PairLayout
    """Of all answers."""
    num_rows: int
    """Rows that count: 0 for the dummy of a rank without work."""
    reference: Tensor | None
    """The reference's log-prob sums, fp64, (rows, answers); None for reference-free losses."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the data say of each row: `margin`, `weight`, `is_desirable`; (rows,) each."""
    trained: PairLayout | None = None
    """Of the answers that the gradient goes through; None where these are all."""
    mean_chosen_length: float | None = None
    """Scored tokens of a chosen answer, a mean over the global batch; None where nothing reads it,
    and where these rows are all of it."""
    slots: Tensor | None = None
    """(rows that count,) Where they stand in the global batch; None where they are all of it."""


@dataclass(frozen=True)
class LaidOut:
    """A micro-batch that is still on the host."""

    layout: PairLayout
    trained: PairLayout | None
    rows: Tensor
    num_rows: int
    mean_chosen_length: float | None
    slots: Tensor | None

    def pinned(self) -> "LaidOut":
        """The same in memory from which a copy to the device need not be waited for."""
        return replace(
            self,
            layout=self.layout.pinned(),
            trained=None if self.trained is None else self.trained.pinned(),
            rows=self.rows.pin_memory(),
            slots=None if self.slots is None else self.slots.pin_memory(),
        )


@dataclass(frozen=True)
class RowBatcher:
    """Makes micro-batches from row indices of one dataset."""

    examples: Sequence[TokenizedExample]
    reference: Tensor | None
    layout: Layout
    device: torch.device
    """Where micro-batches go; `reference` and `columns` are there."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """As in `MicroBatch`, for all rows."""
    chosen_lengths: np.ndarray | None = None
    """(rows,) Scored tokens of the chosen answers, where the loss reads their mean."""
    trained_tokens: np.ndarray | None = None
    """(rows,) Scored tokens of the answers, where the loss is a mean over them; None: over rows."""

    def __call__(self, rows: Sequence[int], batch: Sequence[int] | None = None) -> MicroBatch:
        """Lay out `rows`, on the device; an empty list gives a dummy that counts nothing."""
        return self.place(self.lay_out(rows, batch))

    def num_terms(self, batch: Sequence[int]) -> int:
        """What the losses of a global batch's rows are divided by: rows, or scored tokens."""
        if self.trained_tokens is None:
            return len(batch)
        return int(self.trained_tokens[list(batch)].sum())

    def lay_out(self, rows: Sequence[int], batch: Sequence[int] | None = None) -> LaidOut:
        """The part that works on the host alone, and may run ahead on another thread.

        A dummy runs a real forward, because every rank must take part in the collectives.

        Args:
            rows: of the micro-batch.
            batch: all rows of its global batch, on all ranks; None where these are all of them.
        """
        mean = None
        if self.chosen_lengths is not None and batch is not None:
            mean = float(self.chosen_lengths[list(batch)].mean())
        used = list(rows) or [0]
        examples = [self.examples[i] for i in used]
        layout, trained = build_layout(examples, self.layout), None
        if examples[0].roles[-1] == "mismatched":  # scored without gradient
            own = [replace(e, completions=e.completions[:1], roles=e.roles[:1]) for e in examples]
            trained = build_layout(own, self.layout)
        slots = None
        if batch is not None:
            places = {row: place for place, row in enumerate(batch)}
            slots = torch.tensor([places[row] for row in rows], dtype=torch.int64)
        laid_out = LaidOut(layout, trained, torch.tensor(used), len(rows), mean, slots)
        return laid_out.pinned() if self.device.type == "cuda" else laid_out

    def place(self, laid_out: LaidOut) -> MicroBatch:
        """Bring a laid out micro-batch to the device, without waiting for it."""
        rows = laid_out.rows.to(self.device, non_blocking=True)
        return MicroBatch(
            laid_out.layout.to(self.device),
            laid_out.num_rows,
            None if self.reference is None else self.reference[rows],
            {name: values[rows] for name, values in self.columns.items()},
            None if laid_out.trained is None else laid_out.trained.to(self.device),
            laid_out.mean_chosen_length,
            None if laid_out.slots is None else laid_out.slots.to(self.device, non_blocking=True),
        )
