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


@dataclass(kw_only=True)
class ExportConfig(ComposedConfig, ExportingConfig):
    """Everything exporting needs besides its two folders."""
