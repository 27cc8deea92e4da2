"""Which pairs, and how they become tokens."""

import math
from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section

Truncation = Literal["drop", "keep_start", "keep_end"]
COLUMNS = ("prompt", "chosen", "rejected", "tools", "source")
"""Columns of a pair that `column_map` can rename."""


@dataclass(kw_only=True)
class PairsConfig(Section):
    """Reading pairs: training and scoring need the same."""

    dataset_name: str | None = None
    """The pairs: a .jsonl, .json, .parquet or .csv file, a folder, or a dataset's name on the
    Hugging Face Hub. Required."""

    dataset_split: str = "train"
    """The split to read, where the dataset has several."""

    column_map: dict[str, str] | None = None
    """Columns under other names, as {prompt: question, chosen: good, rejected: bad}. Unset: the
    columns are called prompt (optional), chosen and rejected."""

    max_length: int | None = 2048
    """Most tokens of prompt and completion together, 2 or more; null is no limit. `truncation`
    says what happens to longer ones."""

    max_prompt_length: int | None = None
    """Most tokens of a prompt, 1 to `max_length`. Unset: only `max_length` holds."""

    truncation: Truncation = "drop"
    """What happens to a pair over length. drop: left out and counted; keep_start: its end is
    cut; keep_end: the start of its prompt is cut."""

    max_dropped_fraction: float = 0.01
    """Stop with an error if more than this part of the rows cannot be trained on, 0 to 1 (off)."""

    cache_dir: str | None = None
    """Folder of the reference log-probs. Unset: $PREFTUNE_CACHE, or ~/.cache/preftune."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        if self.dataset_name is None:
            message = "it must name a file, a folder or a dataset on the Hugging Face Hub"
            found.append(Problem("dataset_name", None, message))
        for column in self.column_map or {}:
            if column not in COLUMNS:
                message = f"{column!r} is not a column of a pair; they are {', '.join(COLUMNS)}"
                found.append(Problem("column_map", self.column_map, message))
        if not 0 <= self.max_dropped_fraction <= 1:
            message = "it must be from 0 to 1"
            found.append(Problem("max_dropped_fraction", self.max_dropped_fraction, message))
        return found + _length_problems(self)


@dataclass(kw_only=True)
class DatasetConfig(PairsConfig):
    """The pairs to train on, and those to evaluate on."""

    eval_dataset: str | None = None
    """Pairs for evaluation: a file, a folder or a name on the Hub. Unset: none, unless
    `test_size` is given."""

    eval_split: str | None = None
    """The split of `eval_dataset` to read, where it has several. Unset: test."""

    test_size: int | float | None = None
    """Hold out pairs of `dataset_name` for evaluation, by prompt: a part of the rows (between 0
    and 1) or a number of rows (1 or more). Unset: none."""

    max_train_samples: int | None = None
    """Read only the first this many rows of `dataset_name`, before `test_size` holds any out; 1 or
    more. Unset: all."""

    @property
    def has_eval_data(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_dataset is not None or self.test_size is not None

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = PairsConfig.problems(self) + count("max_train_samples", self.max_train_samples)
        size = self.test_size
        in_range = 0 < size < 1 if isinstance(size, float) else size is None or size >= 1
        if not in_range:
            message = "it must be a part between 0 and 1, or a number of rows (1 or more)"
            found.append(Problem("test_size", size, message))
        if self.eval_dataset is not None and size is not None:
            message = "eval_dataset is given too, and they exclude each other: leave one out"
            found.append(Problem("test_size", size, message, ("eval_dataset",)))
        if self.eval_split is not None and self.eval_dataset is None:
            message = "there is no eval_dataset to read it from: leave it out"
            found.append(Problem("eval_split", self.eval_split, message, ("eval_dataset",)))
        return found


def _length_problems(section: PairsConfig) -> list[Problem]:
    found = count("max_length", section.max_length, least=2)
    found += count("max_prompt_length", section.max_prompt_length)
    if section.max_length is None and section.max_prompt_length is None:
        if section.truncation != "drop":
            message = "it cuts nothing without max_length or max_prompt_length: leave it out"
            others = ("max_length", "max_prompt_length")
            found.append(Problem("truncation", section.truncation, message, others))
    elif (section.max_prompt_length or 0) > (section.max_length or math.inf):
        message = f"it must not be above max_length ({section.max_length})"
        key, value = "max_prompt_length", section.max_prompt_length
        found.append(Problem(key, value, message, ("max_length",)))
    return found
