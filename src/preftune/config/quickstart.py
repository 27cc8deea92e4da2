"""The options of `preftune quickstart`."""

from dataclasses import dataclass

from preftune.config.composed import ComposedConfig
from preftune.config.logging import Progress
from preftune.config.section import Section


@dataclass(kw_only=True)
class QuickstartSection(Section):
    """Where the quickstart writes, and what it shows."""

    output_dir: str = "quickstart"
    """Folder of the run; a finished one is shown again, not trained again."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live bar; plain: a line a logging step; none: nothing;
    auto: rich in a terminal, else plain."""


@dataclass(kw_only=True)
class QuickstartConfig(ComposedConfig, QuickstartSection):
    """Everything the quickstart can be told."""
