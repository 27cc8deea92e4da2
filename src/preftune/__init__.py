"""preftune: align a language model to human preferences.

`from preftune import ExperimentConfig, train` does what `preftune train` does. Names are loaded
on first use, so that `import preftune` and the command's `--help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preftune.config.experiment import ExperimentConfig
    from preftune.data.transforms import DropRow
    from preftune.recipes.score import score
    from preftune.recipes.train import train

__version__ = "0.1.0"
__all__ = ["DropRow", "ExperimentConfig", "__version__", "score", "train"]

_HOMES = {
    "DropRow": "preftune.data.transforms",
    "ExperimentConfig": "preftune.config.experiment",
    "train": "preftune.recipes.train",
    "score": "preftune.recipes.score",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'preftune' has no attribute {name!r}")
