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

    def __call__(self, rows: Sequence[int]) -> MicroBatch:
        """Lay out `rows`; an empty list gives a dummy that counts nothing.

        The dummy runs a real forward, because every rank must take part in the collectives.
        """
        used = list(rows) or [0]
        layout = build_layout([self.examples[i] for i in used], self.layout).to(self.device)
        reference = None
        if self.reference is not None:
            index = torch.tensor(used).to(self.device, non_blocking=True)
            reference = self.reference[index]
        return MicroBatch(layout, len(rows), reference)


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
