"""`preftune merge`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help
from preftune.config.merge import MergeConfig

USAGE = "preftune merge --adapter DIR --output DIR [--key value ...]"
WHAT = (
    "Add a LoRA adapter to its base, in fp32, and write the sum as a model in the Hugging Face "
    "format. Merged model and adapter are compared first: where they differ by more than rounding, "
    "nothing is written."
)


def run(argv: Sequence[str]) -> int:
    """Merge.

    Args:
        argv: the words after `merge`.
    """
    config = options_or_help(MergeConfig, argv, USAGE, WHAT, allow_file=False)
    if config is not None:
        from preftune.recipes.merge import merge

        print(merge(config))
    return 0
