"""`preftune check`."""

from collections.abc import Sequence
from textwrap import fill

from preftune.cli.config import annotated
from preftune.cli.options import wants_help
from preftune.config.experiment import ExperimentConfig
from preftune.config.help import config_help
from preftune.config.parser import parse_with_places

USAGE = "preftune check [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Check configuration and data of a training run without loading weights; everything found "
    "wrong is told at once."
)


def run(argv: Sequence[str]) -> int:
    """Check.

    Args:
        argv: the words after `check`.
    """
    if wants_help(argv):
        print(config_help(ExperimentConfig, USAGE, WHAT), end="")
        return 0
    parsed = parse_with_places(ExperimentConfig, argv)
    from preftune.recipes.check import check

    found = check(parsed.config)
    print(annotated(parsed))
    print(fill(f"defaults: {', '.join(parsed.defaulted)}", 100, break_on_hyphens=False))
    print(found)
    return 0
