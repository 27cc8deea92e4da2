"""The options of every command: sections, their composition, and the parser.

Nothing here touches a device, a file but the config file, or the network.
"""

from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.config.score import ScoreConfig

__all__ = ["ExperimentConfig", "ScoreConfig", "parse_config"]
