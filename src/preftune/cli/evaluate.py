"""`preftune evaluate`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help, wants_help
from preftune.config.evaluate import EvaluateConfig
from preftune.errors import ConfigError

USAGE = "preftune evaluate RUN_OR_MODEL [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Run evaluation jobs on a trained model and on the one that it was trained from, and compare; "
    "or let a judge compare their answers. RUN_OR_MODEL is the folder of a finished run, a model's "
    "or adapter's folder, or a name on the Hub. What has run is not run again. A job that fails "
    "ends the command with exit code 1, after the others have run."
)


def run(argv: Sequence[str]) -> int:
    """Evaluate.

    Args:
        argv: the words after `evaluate`.
    """
    name, options = argv[:1], argv[1:]
    if wants_help(argv):
        options = argv
    elif not name or name[0].startswith("-"):
        raise ConfigError(f"evaluate needs a run or a model first; write: {USAGE}")
    options = ["--dry_run" if word == "--dry-run" else word for word in options]
    config = options_or_help(EvaluateConfig, options, USAGE, WHAT)
    if config is not None:
        from preftune.recipes.evaluate import evaluate

        if text := evaluate(config, name[0]):
            print(text)
    return 0
