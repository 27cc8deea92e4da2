"""`preftune plan`."""

import json
from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.planning import PlanConfig

USAGE = "preftune plan [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Parameters, memory of a device by part, time and disk of a training run, before any weight "
    "loads; says whether it fits, and the smallest change that makes it fit."
)


def run(argv: Sequence[str]) -> int:
    """Plan.

    Args:
        argv: the words after `plan`.
    """
    config = options_or_help(PlanConfig, argv, USAGE, WHAT)
    if config is not None:
        from preftune.planning.shown import as_dict, as_text
        from preftune.recipes.plan import plan

        found, change = plan(config)
        if config.json:
            print(json.dumps(as_dict(found, change), indent=2))
        else:
            print(as_text(found, change))
    return 0
