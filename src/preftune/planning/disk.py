"""What a run leaves on disk."""

from dataclasses import dataclass

from preftune.config.planning import PlanConfig
from preftune.model.load import DTYPES, load_model_config
from preftune.planning.engines import Sizes
from preftune.planning.rows import PlannedRows
from preftune.planning.weights import PlannedModel


@dataclass(frozen=True)
class Disk:
    """Bytes of a run's folder, and of the cache."""

    checkpoint: int
    """Of one checkpoint: weights that train, and the optimizer's state."""
    num_checkpoints: int | None
    """At once at most, with the one that is being written; None: all of the run's."""
    final: int
    reference: int | None
    """Of the stored log-probs; None where none are stored, or the rows are not known."""

    @property
    def total(self) -> int | None:
        """At most; None where it grows with the run."""
        if self.num_checkpoints is None:
            return None
        return self.checkpoint * self.num_checkpoints + self.final + (self.reference or 0)


def disk_of(config: PlanConfig, model: PlannedModel, sizes: Sizes, rows: PlannedRows) -> Disk:
    """From the sizes of a run.

    Args:
        config: of the run.
        model: of the run.
        sizes: of its parts.
        rows: of the run.
    """
    number: int | None = 0
    if config.checkpointing_steps is not None:
        kept = config.keep_last_n_checkpoints
        number = None if kept is None else kept + 1 + (config.metric_for_best_model is not None)
    reference = None
    if config.stores_reference and not rows.is_worst_case:
        # A log-prob a scored token in fp32, and a key of an answer and its sum, 8 bytes each.
        answers = rows.sizes.lengths[:, 1:].size
        reference = 4 * int(rows.num_scored.sum()) + 24 * answers
    if config.use_lora:
        final = 4 * model.parameters.trainable
    else:
        own = getattr(load_model_config(config), "dtype", None)
        dtype = own if config.save_dtype == "auto" and own else DTYPES.get(config.save_dtype)
        final = model.parameters.total * (4 if dtype is None else dtype.itemsize)
    return Disk(sizes.trained + sizes.update.state, number, final, reference)
