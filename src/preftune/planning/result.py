"""What a plan says."""

from dataclasses import dataclass

from preftune.config.planning import PlanConfig
from preftune.distributed.runtime import Precision
from preftune.planning.disk import Disk
from preftune.planning.engines import Division
from preftune.planning.rate import Duration
from preftune.planning.rows import Heaviest, PlannedRows
from preftune.planning.weights import Parameters


@dataclass(frozen=True)
class Place:
    """What one process has to itself."""

    name: str
    memory: int
    """Bytes."""
    is_gpu: bool
    precision: Precision
    fused_attention: bool
    chunk_memory: int
    """What the head's chunks are chosen by."""


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    config: PlanConfig
    place: Place
    parameters: Parameters
    rows: PlannedRows
    heaviest: Heaviest
    division: Division
    process: int
    """Bytes of one process besides its tensors."""
    duration: Duration
    disk: Disk
    num_steps: int | None
    notes: list[str]
    """What was assumed, for people."""

    @property
    def peak(self) -> int:
        """Bytes of one device."""
        return self.division.fullest.total + self.process

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.peak <= self.place.memory
