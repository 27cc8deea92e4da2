"""What a run does when its numbers break."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section

DEFAULT_MAX_SKIPPED = 10
"""Few enough that a run which diverges stops soon, and enough for a handful of bad rows."""


@dataclass(kw_only=True)
class GuardConfig(Section):
    """Losses and gradients that are not finite."""

    on_nonfinite: Literal["stop", "skip_batch"] = "stop"
    """When the loss or a gradient of a step is infinite or no number. stop: save the state from
    before that step, name its rows and end with exit code 3; skip_batch: leave that update out,
    note its rows in run.json and go on, up to `max_skipped_batches` times."""

    max_skipped_batches: int | None = None
    """Most batches that skip_batch leaves out in the whole run, 1 or more; the next one stops the
    run. Unset: 10."""

    def __post_init__(self) -> None:
        """Fill the limit where batches may be skipped."""
        if self.on_nonfinite == "skip_batch" and self.max_skipped_batches is None:
            self.max_skipped_batches = DEFAULT_MAX_SKIPPED

    @property
    def allowed_skips(self) -> int:
        """Batches that may be skipped in the whole run."""
        return (self.max_skipped_batches or 0) if self.on_nonfinite == "skip_batch" else 0

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if self.on_nonfinite == "skip_batch" or self.max_skipped_batches is None:
            return count("max_skipped_batches", self.max_skipped_batches)
        message = "on_nonfinite is 'stop', so none is skipped: leave it out, or choose skip_batch"
        key = "max_skipped_batches"
        return [Problem(key, self.max_skipped_batches, message, ("on_nonfinite",))]
