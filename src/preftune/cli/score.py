"""`preftune score`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.score import ScoreConfig

USAGE = "preftune score [CONFIG.yaml] [--key value ...]"
WHAT = "Log-probs and accuracy of models on pairs; with a reference model, implicit rewards."


def run(argv: Sequence[str]) -> int:
    """Score.

    Args:
        argv: the words after `score`.
    """
    config = options_or_help(ScoreConfig, argv, USAGE, WHAT, for_ranks=True)
    if config is not None:
        from preftune.distributed.runtime import is_main_process, leave_process_group
        from preftune.recipes.score import score

        result = score(config)
        if is_main_process():
            print(result)
        leave_process_group()
    return 0
