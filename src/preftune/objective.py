"""What a micro-batch contributes: a sum over its rows and their count, never a mean.

The step divides by the count of the whole global batch, once. A mean taken here would weigh the
rows of a short micro-batch more than others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from preftune.batching.batcher import MicroBatch
from preftune.losses import (
    AnswerLogps,
    CompletionLogps,
    CompletionLoss,
    Loss,
    NegativeLogLikelihood,
    PairLogps,
    PairLoss,
    UnpairedLoss,
)
from preftune.model.forward import SequenceLogps, pair_logps
from preftune.reference.live import LiveReference

L = TypeVar("L", PairLogps, CompletionLogps, AnswerLogps)
LARGEST_EXPONENT = 700.0
"""Of e, in fp64."""


@dataclass(frozen=True)
class RowMetric:
    """A metric of each row."""

    values: Tensor
    """(rows,) Detached."""
    of: Tensor | None = None
    """(rows,) Which rows it is a metric of; None: all."""
    counts: Tensor | None = None
    """(rows,) Of how many things each value is the sum; None: of one."""

    def at(self, slots: Tensor) -> "RowMetric":
        """Of some of the rows."""
        of, counts = self.of, self.counts
        return RowMetric(
            self.values[slots],
            None if of is None else of[slots],
            None if counts is None else counts[slots],
        )

    @property
    def total(self) -> Tensor:
        """Sum over its rows."""
        # Not a product: what is not of a row may be infinite there.
        return (self.values if self.of is None else self.values.where(self.of, 0.0)).sum()

    @property
    def count(self) -> Tensor | int:
        """Number of its rows, or of what their values are sums of."""
        if self.counts is not None:
            return (self.counts if self.of is None else self.counts.where(self.of, 0)).sum()
        return len(self.values) if self.of is None else self.of.sum()


@dataclass(frozen=True)
class ObjectiveOutput:
    """What a micro-batch adds to the step: a sum to differentiate, and metrics."""

    loss_sum: Tensor
    """What is differentiated. Of a loss that sees the global batch it is the sum over all of it, of
    which only this micro-batch's log-probs have a gradient."""
    metrics: dict[str, RowMetric]
    """By name, over the rows of the micro-batch."""
    running: Tensor | None
    """What the loss keeps for the next global batch (`Loss.next_running`)."""


@dataclass(frozen=True)
class GlobalBatch(Generic[L]):
    """The log-probs of a whole batch, all ranks', and where a micro-batch stands in it."""

    logps: L
    """Without gradient."""
    slots: Tensor
    """Which rows of `logps` are this micro-batch's."""

    def with_rows(self, logps: L) -> L:
        """The log-probs of the batch, in which the micro-batch's rows are `logps`."""
        whole = rows_of(self.logps)
        own = {
            name: whole[name].index_put((self.slots,), values)
            for name, values in rows_of(logps).items()
        }
        return replace(self.logps, **own)


class Objective(ABC, Generic[L]):
    """A loss on the log-probs of a model."""

    loss: Any
    """On the kind of rows that the subclass is for."""

    def __init__(
        self,
        loss: Any,
        *,
        live_reference: LiveReference | None = None,
        load_balancing_weight: float = 0.0,
    ) -> None:
        """Use one loss for every micro-batch.

        Args:
            loss: on the kind of rows that the subclass is for.
            live_reference: scores the micro-batches that hold no log-probs of the reference.
            load_balancing_weight: of the load-balancing loss of a mixture of experts in training.
        """
        self.loss = loss
        self.live_reference = live_reference
        self.load_balancing_weight = load_balancing_weight

    def __call__(
        self,
        model: nn.Module,
        micro_batch: MicroBatch,
        *,
        batch: GlobalBatch[L] | None = None,
        running: Tensor | None = None,
    ) -> ObjectiveOutput:
        """Loss and metrics of a micro-batch.

        Args:
            model: gives the log-probs.
            micro_batch: which rows.
            batch: what a loss that sees the global batch compares them with; None if they are all.
            running: what the loss kept of the global batch before.
        """
        if batch is not None and micro_batch.trained is not None:
            # The other answers are in `batch`, and no gradient goes through them.
            micro_batch = replace(micro_batch, layout=micro_batch.trained)
        if batch is None:  # or the reference's log-probs are in it
            micro_batch = self._with_reference(micro_batch)
        sequences = self._forward(model, micro_batch, with_routing=self.load_balancing_weight > 0)
        logps = self._counted(self._split(sequences, micro_batch), micro_batch)
        output = self.output(logps, batch=batch, running=running)
        if sequences.routing is None:
            return output
        return self._balanced(output, sequences.routing.loss, self._counts(logps))

    def output(
        self, logps: L, *, batch: GlobalBatch[L] | None = None, running: Tensor | None = None
    ) -> ObjectiveOutput:
        """The same from log-probs that are there.

        Args:
            logps: of the rows that count.
            batch: as in `__call__`.
            running: as in `__call__`.
        """
        seen = logps if batch is None else batch.with_rows(logps)
        if running is not None:
            seen = replace(seen, running=running)
        values, metrics = self._evaluate(seen)
        if seen.weight is not None:
            values = values * seen.weight
        metrics = {"loss": RowMetric(values.detach(), counts=self._counts(seen))} | metrics
        if batch is not None:
            metrics = {name: metric.at(batch.slots) for name, metric in metrics.items()}
        return ObjectiveOutput(values.sum(), metrics, self._next_running(seen))

    def rows(self, model: nn.Module, micro_batch: MicroBatch) -> L:
        """The log-probs of the rows that count.

        Of a dummy there are none, but its graph is there, in which every rank must take part.
        """
        return self._counted(self.logps(model, micro_batch), micro_batch)

    def logps(self, model: nn.Module, micro_batch: MicroBatch) -> L:
        """The log-probs that the loss reads, a dummy's too."""
        micro_batch = self._with_reference(micro_batch)
        return self._split(self._forward(model, micro_batch), micro_batch)

    def _balanced(
        self, output: ObjectiveOutput, balance: Tensor, counts: Tensor | None
    ) -> ObjectiveOutput:
        """The same with the load-balancing loss of the micro-batch, counted as its rows are.

        A step's is then a mean over its micro-batches, each weighted by its rows, or their tokens.
        It compares the tokens of a micro-batch with each other, so other micro-batches have another
        one.
        """
        if counts is None:
            counts = torch.ones_like(output.metrics["loss"].values)
        loss_sum = output.loss_sum + self.load_balancing_weight * counts.sum() * balance
        metric = RowMetric(balance.detach() * counts, counts=counts)
        return replace(
            output, loss_sum=loss_sum, metrics=output.metrics | {"load_balancing_loss": metric}
        )

    def _forward(
        self, model: nn.Module, micro_batch: MicroBatch, *, with_routing: bool = False
    ) -> SequenceLogps:
        return pair_logps(
            model,
            micro_batch.layout,
            with_alignment=self.loss.reads_alignment,
            with_routing=with_routing,
        )

    def _with_reference(self, micro_batch: MicroBatch) -> MicroBatch:
        """Before the policy's forward, whose activations then need not be there, too."""
        if self.live_reference is None or micro_batch.reference is not None:
            return micro_batch
        sums = self.live_reference.logps(micro_batch.layout)
        # A dummy is laid out as one row.
        return replace(micro_batch, reference=sums.view(max(micro_batch.num_rows, 1), -1))

    def _counted(self, logps: L, micro_batch: MicroBatch) -> L:
        if micro_batch.num_rows:
            return logps
        return replace(logps, **{name: values[:0] for name, values in rows_of(logps).items()})

    def _counts(self, logps: L) -> Tensor | None:
        """(rows,) Of how many values the loss of each row is the sum; None: of one."""
        return None

    @abstractmethod
    def _split(self, sequences: SequenceLogps, micro_batch: MicroBatch) -> L:
        """The policy's log-probs by row, beside the reference's, which the micro-batch holds."""

    @abstractmethod
    def sides(self, logps: L) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Policy, reference and lengths by kind of answer; empty without a reference."""

    @abstractmethod
    def value_at_reference(self, logps: L) -> float | None:
        """As the loss's."""

    @abstractmethod
    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Means of metrics, and what follows from them."""

    @abstractmethod
    def _evaluate(self, logps: L) -> tuple[Tensor, dict[str, RowMetric]]:
        """The value of each row, with gradient, and metrics."""

    @abstractmethod
    def _next_running(self, logps: L) -> Tensor | None: ...


class PairObjective(Objective[PairLogps]):
    """A loss on pairs."""

    loss: Loss

    def _split(self, sequences: SequenceLogps, micro_batch: MicroBatch) -> PairLogps:
        logps = as_pairs(
            sequences,
            micro_batch.reference,
            micro_batch.columns,
            with_prompt=self.loss.reads_prompt,
        )
        return replace(logps, mean_chosen_length=micro_batch.mean_chosen_length)

    def sides(self, logps: PairLogps) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Policy, reference and lengths by kind of answer; empty without a reference."""
        if logps.ref_chosen is None or logps.ref_rejected is None:
            return {}
        return {
            "chosen": (logps.chosen, logps.ref_chosen, logps.chosen_lengths),
            "rejected": (logps.rejected, logps.ref_rejected, logps.rejected_lengths),
        }

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The means as they are."""
        return means

    def _evaluate(self, logps: PairLogps) -> tuple[Tensor, dict[str, RowMetric]]:
        result = self.loss(logps)
        return result.values, {n: RowMetric(v) for n, v in _pair_metrics(logps, result).items()}

    def value_at_reference(self, logps: PairLogps) -> float | None:
        """As the loss's."""
        return self.loss.value_at_reference(logps)

    def _next_running(self, logps: PairLogps) -> Tensor | None:
        return self.loss.next_running(logps)


class CompletionObjective(Objective[CompletionLogps]):
    """A loss on single labelled completions."""

    loss: UnpairedLoss

    def _split(self, sequences: SequenceLogps, micro_batch: MicroBatch) -> CompletionLogps:
        return as_completions(sequences, micro_batch.reference, micro_batch.columns)

    def sides(self, logps: CompletionLogps) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Policy, reference and lengths by kind of answer."""
        assert logps.reference is not None  # every loss on single completions reads it
        return {"labelled": (logps.policy, logps.reference, logps.lengths)}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The means, and the margin between those of desirable and of undesirable completions."""
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means = means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
        return means

    def _evaluate(self, logps: CompletionLogps) -> tuple[Tensor, dict[str, RowMetric]]:
        result = self.loss(logps)
        return result.values, _completion_metrics(logps, result)

    def value_at_reference(self, logps: CompletionLogps) -> float | None:
        """As the loss's."""
        return self.loss.value_at_reference(logps)

    def _next_running(self, logps: CompletionLogps) -> Tensor | None:
        return self.loss.next_running(logps)


class AnswerObjective(Objective[AnswerLogps]):
    """The negative log-likelihood of answers, a mean over all tokens of the global batch."""

    loss: NegativeLogLikelihood

    def _split(self, sequences: SequenceLogps, micro_batch: MicroBatch) -> AnswerLogps:
        return AnswerLogps(sequences.sums, sequences.lengths, **micro_batch.columns)

    def sides(self, logps: AnswerLogps) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Nothing: there is no reference."""
        return {}

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """The means, with the perplexity in place of the plain negative log-likelihood."""
        means = dict(means)
        nll = means.pop("nll", math.inf)
        return means | ({"perplexity": math.exp(nll)} if nll < LARGEST_EXPONENT else {})

    def _evaluate(self, logps: AnswerLogps) -> tuple[Tensor, dict[str, RowMetric]]:
        values = self.loss(logps)
        return values, {"nll": RowMetric(values.detach(), counts=logps.lengths)}

    def _counts(self, logps: AnswerLogps) -> Tensor:
        return logps.lengths

    def value_at_reference(self, logps: AnswerLogps) -> None:
        """Nothing is known of it."""

    def _next_running(self, logps: AnswerLogps) -> None: ...


AnyObjective = PairObjective | CompletionObjective | AnswerObjective


def objective_of(loss: Loss | UnpairedLoss | NegativeLogLikelihood, **options: Any) -> AnyObjective:
    """What trains with a loss.

    Args:
        loss: which loss.
        **options: those of `Objective`.
    """
    if isinstance(loss, NegativeLogLikelihood):
        return AnswerObjective(loss, **options)
    kind = PairObjective if isinstance(loss, Loss) else CompletionObjective
    return kind(loss, **options)


def _pair_metrics(logps: PairLogps, result: PairLoss) -> dict[str, Tensor]:
    chosen, rejected = logps.chosen.detach(), logps.rejected.detach()
    plain_chosen, plain_rejected = logps.plain
    metrics = {
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/margins": result.chosen_rewards - result.rejected_rewards,
        "rewards/accuracies": (result.chosen_rewards > result.rejected_rewards).double(),
        "logps/chosen": plain_chosen.detach(),
        "logps/rejected": plain_rejected.detach(),
    }
    if logps.ref_chosen is not None and logps.ref_rejected is not None:
        metrics |= {
            "logratios/chosen": chosen - logps.ref_chosen,
            "logratios/rejected": rejected - logps.ref_rejected,
            "logratios/displaced": (chosen < logps.ref_chosen).double(),
        }
    return metrics


def _completion_metrics(logps: CompletionLogps, result: CompletionLoss) -> dict[str, RowMetric]:
    assert logps.reference is not None
    policy, rewards = logps.policy.detach(), result.rewards
    chosen, rejected = logps.is_desirable, ~logps.is_desirable
    logratios = policy - logps.reference
    return {
        "rewards/chosen": RowMetric(rewards, chosen),
        "rewards/rejected": RowMetric(rewards, rejected),
        "rewards/accuracies": RowMetric(((rewards > result.baseline) == chosen).double()),
        "rewards/baseline": RowMetric(result.baseline.expand_as(rewards)),
        "logps/chosen": RowMetric(policy, chosen),
        "logps/rejected": RowMetric(policy, rejected),
        "logratios/chosen": RowMetric(logratios, chosen),
        "logratios/rejected": RowMetric(logratios, rejected),
        "logratios/displaced": RowMetric((logratios < 0).double(), chosen),
    }


def as_pairs(
    sequences: SequenceLogps,
    reference: Tensor | None,
    columns: Any = None,
    *,
    with_prompt: bool = False,
) -> PairLogps:
    """Split answers, numbered pair by pair, into the chosen and the rejected side.

    Args:
        sequences: two answers a pair; with the prompt three, of which it is the last.
        reference: (pairs, answers) sums of the reference.
        columns: what else the data say of each pair.
        with_prompt: whether the prompts were scored.
    """
    answers = 2 + with_prompt
    plain, lengths = sequences.sums.view(-1, answers), sequences.lengths.view(-1, answers)
    sums, is_weighted = sequences.counted.view(-1, answers), sequences.weighted is not None
    alignment = None if sequences.alignment is None else sequences.alignment.view(-1, answers)
    return PairLogps(
        chosen=sums[:, 0],
        rejected=sums[:, 1],
        plain_chosen=plain[:, 0] if is_weighted else None,
        plain_rejected=plain[:, 1] if is_weighted else None,
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        ref_chosen=None if reference is None else reference[:, 0],
        ref_rejected=None if reference is None else reference[:, 1],
        prompt=plain[:, 2] if with_prompt else None,
        prompt_lengths=lengths[:, 2] if with_prompt else None,
        chosen_alignment=None if alignment is None else alignment[:, 0],
        rejected_alignment=None if alignment is None else alignment[:, 1],
        **(columns or {}),
    )


def as_completions(
    sequences: SequenceLogps, reference: Tensor | None, columns: Any
) -> CompletionLogps:
    """Take answers, numbered row by row, for the labelled one and, behind it, a mismatched one."""
    rows = len(columns["is_desirable"])
    sums, lengths = sequences.sums.view(rows, -1), sequences.lengths.view(rows, -1)
    logps = CompletionLogps(
        policy=sums[:, 0],
        lengths=lengths[:, 0],
        reference=None if reference is None else reference[:, 0],
        **columns,
    )
    if sums.shape[1] == 1 or reference is None:
        return logps
    return replace(logps, mismatched=sums[:, 1], mismatched_reference=reference[:, 1])


def rows_of(logps: PairLogps | CompletionLogps | AnswerLogps) -> dict[str, Tensor]:
    """The tensors that have one entry a row, by name."""
    return {k: v for k, v in vars(logps).items() if isinstance(v, Tensor) and k != "running"}


def gathered(
    parts: Sequence[L], slots: Tensor, num_rows: int, all_reduce: Callable[[Tensor], Tensor]
) -> L:
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
