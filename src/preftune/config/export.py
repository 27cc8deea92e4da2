"""The options of `preftune export`."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.composed import ComposedConfig
from preftune.config.section import Section

SaveDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(kw_only=True)
class ExportingConfig(Section):
    """How to write the model."""

    save_dtype: SaveDtype = "auto"
    """How the weights are stored. auto: as the model's that the run started from."""

    trust_remote_code: bool = False
    """Run code that comes with the start model. What the checkpoint says of it does not count: it
    may be of another's making."""


@dataclass(kw_only=True)
class ExportConfig(ComposedConfig, ExportingConfig):
    """Everything exporting needs besides its two folders."""
