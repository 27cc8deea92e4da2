"""`preftune check`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.experiment import ExperimentConfig

USAGE = "preftune check [CONFIG.yaml] [--key value ...]"
WHAT = "Check configuration and data of a training run without loading weights."


def run(argv: Sequence[str]) -> int:
    """Check.

    Args:
        argv: the words after `check`.
    """
    config = options_or_help(ExperimentConfig, argv, USAGE, WHAT)
    if config is not None:
        from preftune.recipes.preflight import check

        print(check(config))
    return 0
