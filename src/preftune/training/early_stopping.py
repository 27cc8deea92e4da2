"""When evaluations have stopped to get better."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from preftune.config.checkpoint import CheckpointConfig


@dataclass
class EarlyStopping:
    """Counts evaluations that are no better than one before them."""

    metric: str
    """As `metrics.jsonl` names it."""
    greater_is_better: bool
    patience: int
    """So many in a row end the run."""
    threshold: float
    """An evaluation is better if it is by more than this; so small steps add up."""
    value: float | None = None
    """Of the last evaluation that was better; None before the first number."""
    num_waited: int = 0
    """Evaluations since then."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> "EarlyStopping | None":
        """What `config` asks for, before the first evaluation; None where it asks for none."""
        metric, patience = config.metric_for_best_model, config.early_stopping_patience
        if metric is None or patience is None:
            return None
        threshold = config.early_stopping_threshold or 0.0
        return cls(metric, bool(config.greater_is_better), patience, threshold)

    @property
    def is_over(self) -> bool:
        """Whether the run ends here."""
        return self.num_waited >= self.patience

    def take(self, record: Mapping[str, float]) -> None:
        """Look at an evaluation; one that is no number, or has none, is never better."""
        value = record.get(self.metric, math.nan)
        if self._is_better(value):
            self.value, self.num_waited = value, 0
        else:
            self.num_waited += 1

    def _is_better(self, value: float) -> bool:
        if math.isnan(value) or self.value is None:
            return not math.isnan(value)
        gain = value - self.value if self.greater_is_better else self.value - value
        return gain > self.threshold

    def describe(self) -> str:
        """Why the run ends."""
        evaluations = "evaluation" if self.num_waited == 1 else f"{self.num_waited} evaluations"
        if self.value is None:
            return f"{self.metric} was no number in the last {evaluations}"
        than = f" by more than {self.threshold:g}" if self.threshold else ""
        return f"{self.metric} was not better than {self.value:.6g}{than} in the last {evaluations}"

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on counting where a checkpoint stood, if it is by the same measure."""
        same = saved and (saved["metric"], saved["greater_is_better"]) == (
            self.metric,
            self.greater_is_better,
        )
        if saved and same:
            self.value, self.num_waited = saved["value"], saved["num_waited"]

    def as_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return asdict(self)
