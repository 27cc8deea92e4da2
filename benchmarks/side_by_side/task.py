"""What both tools are asked to do."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A training run on the pairs of a file, in its order; linear schedule, no warm-up, AdamW."""

    model: str
    """Folder of the policy before its first step."""
    file: str
    max_length: int | None
    """Most tokens of prompt and answer; longer rows are not in the file."""
    batch_size: int
    steps: int
    warmup: int
    """Of the steps, the first that are not timed."""
    learning_rate: float
    beta: float
    scratch: str
    """An empty folder."""
