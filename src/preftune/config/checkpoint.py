"""What a run leaves on disk."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section


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

    resume: str = "auto"
    """Where to go on. auto: from the last checkpoint in `output_dir`, if any; never: an error if
    there is one; or the path of a checkpoint."""

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How the weights in final/ are stored. auto: as the source model's."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("keep_last_n_checkpoints", self.keep_last_n_checkpoints)
        if isinstance(self.checkpointing_steps, int) and self.checkpointing_steps < 1:
            message = "it must be 1 or more, epoch, or null for none"
            found.append(Problem("checkpointing_steps", self.checkpointing_steps, message))
        return found
