"""The rows that a plan is made for: those of the dataset, or the longest there may be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preftune.batching.layout import LayoutName
from preftune.batching.micro_batches import MicroBatching, RowSizes, num_positions
from preftune.batching.sampler import PairSampler
from preftune.config.planning import PlanConfig
from preftune.errors import ConfigError
from preftune.schema import Completion, Role, TokenizedExample

_MOST_RANKS = 8
"""Whose shares of a batch are looked at for the heaviest micro-batch; all are dealt alike."""


@dataclass(frozen=True)
class PlannedRows:
    """Rows and how they go through the model."""

    examples: Sequence[TokenizedExample]
    sizes: RowSizes
    num_scored: np.ndarray
    """(rows,) Tokens that the loss reads."""
    is_worst_case: bool
    """Whether they stand for a dataset that could not be read."""

    @property
    def attention_pairs(self) -> np.ndarray:
        """(rows,) How many times a query meets a key, with the causal half left out."""
        prompts, answers = self.sizes.lengths[:, 0], self.sizes.lengths[:, 1:]
        first = (prompts + answers[:, 0]) ** 2 / 2
        others = (answers[:, 1:] * (prompts[:, None] + answers[:, 1:] / 2)).sum(axis=1)
        return first + others

    @property
    def num_tokens(self) -> np.ndarray:
        """(rows,) With each prompt once."""
        return self.sizes.lengths.sum(axis=1)


def of_dataset(
    examples: Sequence[TokenizedExample], sizes: RowSizes, scored: np.ndarray
) -> PlannedRows:
    """The rows of a dataset.

    Args:
        examples: all of them.
        sizes: of all.
        scored: (rows, answers) tokens that the loss reads.
    """
    return PlannedRows(examples, sizes, scored.sum(axis=1), is_worst_case=False)


def worst_case(config: PlanConfig, context: int | None) -> PlannedRows:
    """As many rows of `max_length` as a micro-batch may hold.

    Args:
        config: of the run.
        context: positions of the model; None: no bound.

    Raises:
        ConfigError: nothing bounds a row's length.
    """
    bounds = [bound for bound in (config.max_length, context) if bound is not None]
    if not bounds:
        raise ConfigError(
            "max_length is not set, and the dataset cannot be read here: nothing bounds a row; "
            "set --max_length"
        )
    longest = min(bounds)
    roles: dict[str, tuple[Role, ...]] = {
        "pairs": ("chosen", "rejected"),
        "labelled": ("chosen", "mismatched") if config.reads_mismatched else ("chosen",),
        "supervised": ("answer",),
    }
    answers = len(roles[config.row_kind])
    number = config.per_device_train_batch_size
    if config.max_tokens_per_microbatch is not None:
        number = max(1, config.max_tokens_per_microbatch // (1 + answers * (longest - 1)))
    answer = Completion((1,) * (longest - 1))
    rows = [
        TokenizedExample(f"row {i}", (i,), (answer,) * answers, roles[config.row_kind], "none", i)
        for i in range(number)
    ]
    scored = np.full(number, answers * (longest - 1))
    return PlannedRows(rows, RowSizes.of(rows), scored, is_worst_case=True)


@dataclass(frozen=True)
class Heaviest:
    """The micro-batch that takes most memory."""

    rows: list[int]
    positions: int
    """Tokens, padding included."""
    num_in_step: int
    """Micro-batches of a device in one step."""


def heaviest_of(
    rows: PlannedRows, config: PlanConfig, layout: LayoutName, sampler: PairSampler, num_steps: int
) -> Heaviest:
    """Look through all steps of a run.

    Args:
        rows: of the run.
        config: of the run.
        layout: how rows go through the model.
        sampler: gives the batches.
        num_steps: of the run.
    """
    micro = MicroBatching(
        rows.sizes, layout, config.per_device_train_batch_size, config.max_tokens_per_microbatch
    )
    shares = config.num_processes // config.sequence_parallel_size
    if rows.is_worst_case:
        everything = list(range(len(rows.examples)))
        count = config.gradient_accumulation_steps
        if config.total_batch_size is not None:
            count = -(-config.total_batch_size // (shares * len(everything)))
        return Heaviest(everything, num_positions(everything, rows.sizes, layout), count)
    found: list[list[int]] = []
    most = 1
    for step in range(num_steps):
        for rank in range(min(shares, _MOST_RANKS)):
            own = micro.split(sampler.batch(step), rank, shares)
            most = max(most, len(own))
            found.append(max(own, key=lambda r: num_positions(r, rows.sizes, layout)))
    chosen = max(found, key=lambda r: num_positions(r, rows.sizes, layout))
    return Heaviest(chosen, num_positions(chosen, rows.sizes, layout), most)
