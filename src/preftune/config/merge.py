"""The options of `preftune merge`."""

from dataclasses import dataclass
from typing import Literal

from preftune.config.composed import ComposedConfig
from preftune.config.export import SaveDtype
from preftune.config.problem import Problem
from preftune.config.section import Section


@dataclass(kw_only=True)
class MergingConfig(Section):
    """What to merge, and how to write it."""

    adapter: str | None = None
    """The LoRA adapter: a folder such as RUN/final, or a name on the Hub. Required."""

    adapter_revision: str | None = None
    """Branch, tag or commit of `adapter` on the Hub. Unset: its default branch."""

    output: str | None = None
    """The folder to write, which must not exist. Required."""

    model_name_or_path: str | None = None
    """The base. Unset: the one that the adapter's files name."""

    base: Literal["auto", "dequantized", "original"] = "auto"
    """Of an adapter that was trained over a quantised base, the weights that it is added to.
    dequantized: what the quantised ones stand for, which training saw; original: those of the
    base's files, which it did not see. auto: dequantized for such an adapter, else original."""

    save_dtype: SaveDtype = "auto"
    """How the weights are stored. auto: as the base's."""

    trust_remote_code: bool = False
    """Run code that comes with the base."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        needed = {
            "adapter": "it must name a LoRA adapter: a folder, or a name on the Hub",
            "output": "it must name the folder to write",
        }
        return [
            Problem(key, None, message)
            for key, message in needed.items()
            if getattr(self, key) is None
        ]


@dataclass(kw_only=True)
class MergeConfig(ComposedConfig, MergingConfig):
    """Everything merging needs."""
