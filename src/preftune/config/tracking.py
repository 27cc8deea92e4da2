"""What the run is called, and its seeds."""

from dataclasses import dataclass
from unicodedata import category

from preftune.config.problem import Problem
from preftune.config.section import Section

_SEEDS = 2**32


@dataclass(kw_only=True)
class TrackingConfig(Section):
    """The run and its randomness."""

    exp_name: str = "preftune"
    """Name of the experiment that the run belongs to; no path separator, no control character."""

    run_name: str | None = None
    """Name of the run, for model card and trackers; no path separator, no control character.
    Unset: `exp_name`, two underscores and `seed`."""

    seed: int = 42
    """Seed of everything random but the order of the data (dropout, split), 0 to 4294967295."""

    data_seed: int | None = None
    """Seed of the order of the data, 0 to 4294967295. Unset: `seed`."""

    def __post_init__(self) -> None:
        """Name the run."""
        if self.run_name is None:
            self.run_name = f"{self.exp_name}__{self.seed}"

    @property
    def resolved_data_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = [
            Problem(key, value, f"it must be from 0 to {_SEEDS - 1}")
            for key, value in (("seed", self.seed), ("data_seed", self.data_seed))
            if value is not None and not 0 <= value < _SEEDS
        ]
        names = {"exp_name": self.exp_name, "run_name": self.run_name or ""}
        if names["run_name"] == f"{self.exp_name}__{self.seed}":
            del names["run_name"]  # what is wrong with it then is exp_name's
        message = "it must be a name without /, \\ and control characters"
        return found + [
            Problem(key, name, message) for key, name in names.items() if any(map(_is_bad, name))
        ]


def _is_bad(character: str) -> bool:
    return character in "/\\" or category(character) in ("Cc", "Cs", "Zl", "Zp")
