"""`preftune quickstart`."""

from collections.abc import Sequence
from pathlib import Path

from preftune.cli.options import options_or_help
from preftune.config.quickstart import QuickstartConfig

USAGE = "preftune quickstart [--key value ...]"
WHAT = "Train a small model that comes with preftune on pairs that come with it."


def run(argv: Sequence[str]) -> int:
    """Run the quickstart.

    Args:
        argv: the words after `quickstart`.
    """
    config = options_or_help(QuickstartConfig, argv, USAGE, WHAT, allow_file=False)
    if config is not None:
        from preftune.recipes.quickstart import quickstart

        quickstart(output_dir=Path(config.output_dir), progress=config.progress)
    return 0
