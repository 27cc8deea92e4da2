"""What a micro-batch contributes: a sum over its pairs and their count, never a mean.

The step divides by the count of the whole global batch, once. A mean taken here would weigh the
pairs of a short micro-batch more than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from preftune.batching.layout import Layout, PairLayout, build_layout
from preftune.losses import Loss, PairLogps
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
    """Sums over the pairs of a micro-batch."""

    loss_sum: Tensor
    count: int
    sums: dict[str, Tensor]
    """Metric name -> sum over the pairs, detached."""


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

    def __call__(self, model: nn.Module, micro_batch: MicroBatch) -> ObjectiveOutput:
        """Sums of loss and metrics over the pairs of a micro-batch."""
        logps = self.logps(model, micro_batch)
        result = self.loss(logps)
        per_pair = {
            "rewards/chosen": result.chosen_rewards,
            "rewards/rejected": result.rejected_rewards,
            "rewards/margins": result.chosen_rewards - result.rejected_rewards,
            "rewards/accuracies": (result.chosen_rewards > result.rejected_rewards).double(),
            "logps/chosen": logps.chosen.detach(),
            "logps/rejected": logps.rejected.detach(),
        }
        # The dummy of a rank without work: its value must not count, its graph must exist.
        weight = 1.0 if micro_batch.num_pairs else 0.0
        loss_sum = result.values.sum() * weight
        sums = {"loss": loss_sum.detach()}
        sums |= {name: values.sum() * weight for name, values in per_pair.items()}
        return ObjectiveOutput(loss_sum, micro_batch.num_pairs, sums)

    def logps(self, model: nn.Module, micro_batch: MicroBatch) -> PairLogps:
        """The log-probs that the loss reads."""
        sequences = pair_logps(model, micro_batch.layout, with_alignment=self.loss.reads_alignment)
        return as_pairs(sequences, micro_batch.reference)


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
