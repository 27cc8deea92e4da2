"""What a micro-batch contributes: a sum over its pairs and their count, never a mean.

The step divides by the count of the whole global batch, once. A mean taken here would weigh the
pairs of a short micro-batch more than others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from preftune.batching.layout import Layout, PairLayout, build_layout
from preftune.losses import Loss, PairLogps, PairLoss
from preftune.model.forward import SequenceLogps, pair_logps
from preftune.schema import TokenizedExample


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a dataset, laid out for one forward."""

    layout: PairLayout
    num_pairs: int
    """Pairs that count: 0 for the dummy of a rank without work."""
    reference: Tensor | None
    """The reference's log-prob sums, fp64, (pairs, 2); None for reference-free losses."""


@dataclass(frozen=True)
class LaidOut:
    """A micro-batch that is still on the host."""

    layout: PairLayout
    rows: Tensor
    num_pairs: int

    def pinned(self) -> "LaidOut":
        """The same in memory from which a copy to the device need not be waited for."""
        return LaidOut(self.layout.pinned(), self.rows.pin_memory(), self.num_pairs)


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a micro-batch adds to the step: a sum to differentiate, and metrics."""

    loss_sum: Tensor
    """What is differentiated. Of a loss that sees the global batch it is the sum over all of it, of
    which only this micro-batch's log-probs have a gradient."""
    per_pair: dict[str, Tensor]
    """Metric name -> one number for each pair of the micro-batch, detached."""
    running: Tensor | None
    """What the loss keeps for the next global batch (`Loss.next_running`)."""


@dataclass(frozen=True)
class GlobalBatch:
    """The log-probs of a whole batch, all ranks', and where a micro-batch stands in it."""

    logps: PairLogps
    """Without gradient."""
    slots: Tensor
    """Which rows of `logps` are this micro-batch's."""

    def with_rows(self, logps: PairLogps) -> PairLogps:
        """The log-probs of the batch, in which the micro-batch's rows are `logps`."""
        own = rows_of(logps)
        whole = {
            name: values.index_put((self.slots,), own[name])
            for name, values in rows_of(self.logps).items()
        }
        return replace(self.logps, **whole)


@dataclass(frozen=True)
class PairBatcher:
    """Makes micro-batches from row indices of one dataset."""

    examples: Sequence[TokenizedExample]
    reference: Tensor | None
    layout: Layout
    device: torch.device
    """Where micro-batches go; `reference` is there."""

    def __call__(self, rows: Sequence[int]) -> MicroBatch:
        """Lay out `rows`, on the device; an empty list gives a dummy that counts nothing."""
        return self.place(self.lay_out(rows))

    def lay_out(self, rows: Sequence[int]) -> LaidOut:
        """The part that works on the host alone, and may run ahead on another thread.

        A dummy runs a real forward, because every rank must take part in the collectives.
        """
        used = list(rows) or [0]
        layout = build_layout([self.examples[i] for i in used], self.layout)
        laid_out = LaidOut(layout, torch.tensor(used), len(rows))
        return laid_out.pinned() if self.device.type == "cuda" else laid_out

    def place(self, laid_out: LaidOut) -> MicroBatch:
        """Bring a laid out micro-batch to the device, without waiting for it."""
        reference = None
        if self.reference is not None:
            reference = self.reference[laid_out.rows.to(self.device, non_blocking=True)]
        layout = laid_out.layout.to(self.device)
        return MicroBatch(layout, laid_out.num_pairs, reference)


class PreferenceObjective:
    """A pair loss on the log-probs of a model."""

    def __init__(self, loss: Loss) -> None:
        """Use `loss` for every micro-batch."""
        self.loss = loss

    def __call__(
        self,
        model: nn.Module,
        micro_batch: MicroBatch,
        *,
        batch: GlobalBatch | None = None,
        running: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss and metrics of a micro-batch.

        Args:
            model: gives the log-probs.
            micro_batch: which pairs.
            batch: what a loss that sees the global batch compares them with; None if they are all.
            running: what the loss kept of the global batch before.
        """
        return self.output(self.rows(model, micro_batch), batch=batch, running=running)

    def output(
        self,
        logps: PairLogps,
        *,
        batch: GlobalBatch | None = None,
        running: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The same from log-probs that are there.

        Args:
            logps: of the pairs that count.
            batch: as in `__call__`.
            running: as in `__call__`.
        """
        seen = logps if batch is None else batch.with_rows(logps)
        seen = replace(seen, running=running)
        result = self.loss(seen)
        values = result.values if seen.weight is None else result.values * seen.weight
        per_pair = {"loss": values.detach()} | _metrics(seen, result)
        if batch is not None:
            per_pair = {name: of_all[batch.slots] for name, of_all in per_pair.items()}
        return ObjectiveOutput(values.sum(), per_pair, self.loss.next_running(seen))

    def rows(self, model: nn.Module, micro_batch: MicroBatch) -> PairLogps:
        """The log-probs of the pairs that count.

        Of a dummy there are none, but its graph is there, in which every rank must take part.
        """
        logps = self.logps(model, micro_batch)
        if micro_batch.num_pairs:
            return logps
        return replace(logps, **{name: values[:0] for name, values in rows_of(logps).items()})

    def logps(self, model: nn.Module, micro_batch: MicroBatch) -> PairLogps:
        """The log-probs that the loss reads, a dummy's too."""
        sequences = pair_logps(model, micro_batch.layout, with_alignment=self.loss.reads_alignment)
        return as_pairs(sequences, micro_batch.reference)


def _metrics(logps: PairLogps, result: PairLoss) -> dict[str, Tensor]:
    """Metric name -> one number a pair, detached."""
    chosen, rejected = logps.chosen.detach(), logps.rejected.detach()
    per_pair = {
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/margins": result.chosen_rewards - result.rejected_rewards,
        "rewards/accuracies": (result.chosen_rewards > result.rejected_rewards).double(),
        "logps/chosen": chosen,
        "logps/rejected": rejected,
    }
    if logps.ref_chosen is not None and logps.ref_rejected is not None:
        per_pair |= {
            "logratios/chosen": chosen - logps.ref_chosen,
            "logratios/rejected": rejected - logps.ref_rejected,
            "logratios/displaced": (chosen < logps.ref_chosen).double(),
        }
    return per_pair


def as_pairs(sequences: SequenceLogps, reference: Tensor | None) -> PairLogps:
    """Split answers, numbered pair by pair, into the chosen and the rejected side."""
    sums, lengths = sequences.sums.view(-1, 2), sequences.lengths.view(-1, 2)
    alignment = None if sequences.alignment is None else sequences.alignment.view(-1, 2)
    return PairLogps(
        chosen=sums[:, 0],
        rejected=sums[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        ref_chosen=None if reference is None else reference[:, 0],
        ref_rejected=None if reference is None else reference[:, 1],
        chosen_alignment=None if alignment is None else alignment[:, 0],
        rejected_alignment=None if alignment is None else alignment[:, 1],
    )


def rows_of(logps: PairLogps) -> dict[str, Tensor]:
    """The tensors that have one entry a row, by name."""
    return {k: v for k, v in vars(logps).items() if v is not None and k != "running"}


def gathered(
    parts: Sequence[PairLogps], slots: Tensor, num_rows: int, all_reduce: Callable[[Tensor], Tensor]
) -> PairLogps:
    """The rows of all ranks, on every rank.

    Args:
        parts: this rank's rows; at least one part, which may hold no row.
        slots: (rows of all parts) where they stand among all rows.
        num_rows: of all ranks.
        all_reduce: sums a tensor over ranks.
    """
    fields = [rows_of(part) for part in parts]
    # One number a row and field in fp64, which holds sums and counts exactly.
    mine = [torch.stack([values.double() for values in rows.values()], dim=1) for rows in fields]
    table = mine[0].new_zeros(num_rows, len(fields[0]))
    table[slots] = torch.cat(mine)
    columns = all_reduce(table).unbind(dim=1)
    whole = {
        name: column.to(values.dtype)
        for (name, values), column in zip(fields[0].items(), columns, strict=True)
    }
    return replace(parts[0], **whole)
