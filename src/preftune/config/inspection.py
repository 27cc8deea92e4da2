"""The configuration of `preftune data inspect`."""

from dataclasses import dataclass

from preftune.config.experiment import ExperimentConfig
from preftune.config.problem import Problem, count
from preftune.config.section import Section


@dataclass(kw_only=True)
class ShowingConfig(Section):
    """What to show, and where to write it."""

    num_rows: int = 3
    """Rows of each dataset to show token by token, spread over it; 0 or more. Where some are cut
    to a length, one of these is among them."""

    row: str | None = None
    """Show this row alone, by its id as it stands in messages and run.json, such as
    pairs.jsonl:7. Unset: `num_rows` rows."""

    html: str | None = None
    """A new .html file for the same as one page that needs nothing else. Unset: none."""

    dropped: str | None = None
    """A new .jsonl file for every dropped row with its id, reason and detail. Unset: none."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("num_rows", self.num_rows, least=0)
        for key, value, suffix in (
            ("html", self.html, ".html"),
            ("dropped", self.dropped, ".jsonl"),
        ):
            if value is not None and not value.endswith(suffix):
                found.append(Problem(key, value, f"it must be the path of a {suffix} file"))
        return found


@dataclass(kw_only=True)
class InspectConfig(ExperimentConfig, ShowingConfig):
    """The training run whose data is looked at, flat, and what to show of it.

    Every setting of a run is read, so that its config.yaml can be given as it is; those that say
    nothing of data have no effect here.
    """
