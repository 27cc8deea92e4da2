"""The options of `preftune report`."""

from dataclasses import dataclass

from preftune.config.composed import ComposedConfig
from preftune.config.section import Section


@dataclass(kw_only=True)
class ReportSection(Section):
    """Where the report goes."""

    output: str | None = None
    """The HTML file to write, or to replace. Unset: report.html in the run's folder; needed for
    several runs."""


@dataclass(kw_only=True)
class ReportConfig(ComposedConfig, ReportSection):
    """Everything a report needs besides its runs."""
