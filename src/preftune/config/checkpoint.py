"""What a run leaves on disk."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.export import SaveDtype
from preftune.config.problem import Problem, below, count
from preftune.config.run_time import seconds_of
from preftune.config.section import Section

_SMALLER = ("loss", "perplexity")
_GREATER = ("accuracies", "accuracies_length_matched", "margins", "chosen")


@dataclass(kw_only=True)
class CheckpointConfig(Section):
    """The run's folder, checkpoints and resuming."""

    output_dir: str = "output"
    """The run's folder."""

    checkpointing_steps: int | Literal["epoch"] | None = 500
    """Optimizer steps between two checkpoints, 1 or more, or epoch; the last step always makes one.
    null: none, so a stopped run starts again; final/ is written all the same."""

    keep_last_n_checkpoints: int | None = 3
    """How many of the latest checkpoints stay on disk, 1 or more; null: all."""

    checkpoint_max_gb: float | None = None
    """Most space that the checkpoints of a run may take, in GB of 10^9 bytes, above 0: the oldest
    go first. The newest and the best always stay; while one is written it stands beside the others.
    Unset: no limit."""

    checkpoint_async: bool = True
    """Write checkpoints in the background while training goes on: the state is copied to the host's
    memory before the next update, once more what a checkpoint takes. Where that memory is not free,
    and with false, training waits for each checkpoint."""

    metric_for_best_model: str | None = None
    """Also keep the best checkpoint by this metric of evaluation, such as eval/loss or
    eval/rewards/accuracies, as `metrics.jsonl` names it. An evaluation that is better than all
    before it makes a checkpoint; run.json names the best as best_checkpoint. Unset: none."""

    greater_is_better: bool | None = None
    """Whether a greater `metric_for_best_model` is a better one. Unset: no for loss and
    perplexity, yes for accuracies, margins and chosen; for other metrics it must be given."""

    early_stopping_patience: int | None = None
    """End the run when as many evaluations in a row, 1 or more, have brought no better
    `metric_for_best_model`. Unset: train to the last step."""

    early_stopping_threshold: float | None = None
    """By how much an evaluation must be better than the last one that counted as better, 0 or more,
    to count for `early_stopping_patience`. Unset: 0 with that."""

    load_best_model_at_end: bool = False
    """Write the weights of the best checkpoint to final/, in place of those of the last step."""

    max_run_time: str | int | None = None
    """Save, stop and exit with 75 when this command has run so long; the same command goes on.
    Such as 90m, 2h, 1h30m, 1-12:00:00 as Slurm writes it, or a number of seconds. Leave room for
    one step and one checkpoint before the limit of the machine. Unset: no limit."""

    resume: str = "auto"
    """Where to go on. auto: from the last checkpoint in `output_dir`, if any; never: an error if
    there is one; or the path of a checkpoint."""

    save_dtype: SaveDtype = "auto"
    """How the weights in final/ are stored. auto: as the source model's."""

    def __post_init__(self) -> None:
        """Say which way the metric is better, where its name tells."""
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            name = str(self.metric_for_best_model).rsplit("/", 1)[-1]
            if name in _SMALLER + _GREATER:
                self.greater_is_better = name in _GREATER
        if self.early_stopping_patience is not None and self.early_stopping_threshold is None:
            self.early_stopping_threshold = 0.0

    @property
    def max_run_seconds(self) -> float | None:
        """`max_run_time` in seconds."""
        return None if self.max_run_time is None else seconds_of(self.max_run_time)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("keep_last_n_checkpoints", self.keep_last_n_checkpoints)
        found += count("early_stopping_patience", self.early_stopping_patience)
        if isinstance(self.checkpointing_steps, int) and self.checkpointing_steps < 1:
            message = "it must be 1 or more, epoch, or null for none"
            found.append(Problem("checkpointing_steps", self.checkpointing_steps, message))
        if self.checkpoint_max_gb is not None and self.checkpoint_max_gb <= 0:
            message = "it must be above 0, or null for no limit"
            found.append(Problem("checkpoint_max_gb", self.checkpoint_max_gb, message))
        if self.max_run_time is not None:
            try:
                found += below(
                    "max_run_time", seconds_of(self.max_run_time), 1, "at least a second"
                )
            except ValueError as error:
                found.append(Problem("max_run_time", self.max_run_time, str(error)))
        return found + _threshold_problems(self) + _best_problems(self)


def _threshold_problems(section: CheckpointConfig) -> list[Problem]:
    key, value = "early_stopping_threshold", section.early_stopping_threshold
    if value is not None and section.early_stopping_patience is None:
        message = "it is of no use without early_stopping_patience: give that, or leave it out"
        return [Problem(key, value, message, ("early_stopping_patience",))]
    return below(key, value, 0, "it must be 0 or more")


def _best_problems(section: CheckpointConfig) -> list[Problem]:
    metric, greater = section.metric_for_best_model, section.greater_is_better
    if metric is None:
        message = "there is no metric_for_best_model that it would be about: leave it out"
        settings = {
            "greater_is_better": greater,
            "early_stopping_patience": section.early_stopping_patience,
            "load_best_model_at_end": section.load_best_model_at_end or None,
        }
        return [
            Problem(key, value, message, ("metric_for_best_model",))
            for key, value in settings.items()
            if value is not None
        ]
    if section.checkpointing_steps is None:
        message = "checkpointing_steps is null, so there are no checkpoints: leave one of them out"
        return [Problem("metric_for_best_model", metric, message, ("checkpointing_steps",))]
    if greater is None:
        message = f"whether a greater {metric} is better cannot be told by its name: give it"
        return [Problem("greater_is_better", None, message, ("metric_for_best_model",))]
    return []
