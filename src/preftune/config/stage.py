"""What kind of training a run is."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Stage: TypeAlias = Literal["sft", "dpo"]


@dataclass(kw_only=True)
class StageChoice:
    """The stage, which other sections take defaults from."""

    stage: Stage = "dpo"
    """What kind of training. dpo: on pairs, with a loss of the DPO family; sft: supervised
    fine-tuning on what an assistant said, before it."""
