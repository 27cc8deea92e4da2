"""`preftune export`."""

from collections.abc import Sequence

from preftune.cli.options import options_or_help, wants_help
from preftune.config.export import ExportConfig
from preftune.errors import ConfigError

USAGE = "preftune export CHECKPOINT OUTPUT_DIR [--key value ...]"
WHAT = (
    "Write the weights of a checkpoint (RUN/checkpoints/step-...) as a model in the Hugging Face "
    "format: safetensors, config, tokenizer and model card, as final/ would hold them. OUTPUT_DIR "
    "must not exist; the model that the run started from must."
)


def run(argv: Sequence[str]) -> int:
    """Export.

    Args:
        argv: the words after `export`.
    """
    places, options = list(argv[:2]), argv[2:]
    if wants_help(argv):
        options = argv
    elif len(places) < 2 or any(word.startswith("--") for word in places):
        raise ConfigError(f"export needs two folders first; write: {USAGE}")
    config = options_or_help(ExportConfig, options, USAGE, WHAT, allow_file=False)
    if config is not None:
        from preftune.recipes.export import export

        trusted = config.trust_remote_code
        print(export(places[0], places[1], config.save_dtype, trust_remote_code=trusted))
    return 0
