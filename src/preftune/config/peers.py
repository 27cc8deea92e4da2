"""How the processes of a run wait for each other."""

from dataclasses import dataclass

from preftune.config.problem import Problem, below
from preftune.config.run_time import seconds_of
from preftune.config.section import Section


@dataclass(kw_only=True)
class PeersConfig(Section):
    """Several processes."""

    collective_timeout: str | int = "2h"
    """How long a process waits for the others before it ends and says so; 10 seconds or more, such
    as 90m or 2h. The longest wait is for rank 0 to tokenise the data, or to write final/."""

    @property
    def collective_seconds(self) -> float:
        """`collective_timeout` in seconds."""
        return seconds_of(self.collective_timeout)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        key, value = "collective_timeout", self.collective_timeout
        try:
            return below(key, seconds_of(value), 10, "it must be 10 seconds or more")
        except ValueError as error:
            return [Problem(key, value, str(error))]
