"""Seeds."""

from dataclasses import dataclass

from preftune.config.problem import Problem
from preftune.config.section import Section

_SEEDS = 2**32


@dataclass(kw_only=True)
class TrackingConfig(Section):
    """The run and its randomness."""

    seed: int = 42
    """Seed of everything random but the order of the data (dropout, split), 0 to 4294967295."""

    data_seed: int | None = None
    """Seed of the order of the data, 0 to 4294967295. Unset: `seed`."""

    @property
    def resolved_data_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        return [
            Problem(key, value, f"it must be from 0 to {_SEEDS - 1}")
            for key, value in (("seed", self.seed), ("data_seed", self.data_seed))
            if value is not None and not 0 <= value < _SEEDS
        ]
