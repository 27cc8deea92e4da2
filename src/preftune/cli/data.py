"""`preftune data`: inspect, tokenize."""

from collections.abc import Callable, Sequence

from preftune.cli.options import options_or_help, wants_help
from preftune.config.experiment import ExperimentConfig
from preftune.config.inspection import InspectConfig
from preftune.errors import ConfigError

USAGES = {
    "inspect": "preftune data inspect [CONFIG.yaml] [--key value ...]",
    "tokenize": "preftune data tokenize [CONFIG.yaml] [--key value ...]",
}
WHAT = {
    "inspect": "Look at the pairs of a training run: rows token by token with what is trained "
    "marked, proofs, lengths, prompts, duplicates, overlap, what truncation would cost, and every "
    "dropped row. Takes the options of `preftune train` and its config files; loads no weights.",
    "tokenize": "Fill the cache of tokenised data for a training run, and say what was made or "
    "found. Takes the options of `preftune train` and its config files; loads no weights.",
}


def run(argv: Sequence[str]) -> int:
    """Look at data, or tokenise it.

    Args:
        argv: the words after `data`.
    """
    command, rest = (argv[0], argv[1:]) if argv else ("", ())
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "inspect": inspect,
        "tokenize": tokenize,
    }
    if command in commands:
        commands[command](rest)
    elif wants_help(argv):
        print(_help(), end="")
    else:
        said = f"data {command} is not a command" if command else "data needs a command"
        raise ConfigError(f"{said}; write: preftune data {' or '.join(commands)}, with --help")
    return 0


def inspect(argv: Sequence[str]) -> None:
    """Print what there is to see, and write the page if asked."""
    config = options_or_help(InspectConfig, argv, USAGES["inspect"], WHAT["inspect"])
    if config is None:
        return
    from rich.console import Console

    from preftune.data.inspection.terminal import report_text
    from preftune.recipes.inspect_data import inspect_data

    report = inspect_data(config)
    console = Console()
    colours = console.is_terminal and console.color_system is not None and not console.no_color
    console.print(report_text(report, colours=colours), highlight=False, soft_wrap=True)
    for path in (config.html, config.dropped):
        if path is not None:
            console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)


def tokenize(argv: Sequence[str]) -> None:
    """Fill the cache and say so."""
    config = options_or_help(ExperimentConfig, argv, USAGES["tokenize"], WHAT["tokenize"])
    if config is None:
        return
    from preftune.recipes.pairs import prepare_data

    print(prepare_data(config))


def _help() -> str:
    lines = [f"  {usage}\n      {WHAT[name]}\n" for name, usage in USAGES.items()]
    return "usage: preftune data COMMAND ...\n\n" + "".join(lines)
