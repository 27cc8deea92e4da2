"""`preftune config show`."""

from collections.abc import Sequence

from preftune.cli.options import wants_help
from preftune.config.composed import ComposedConfig, yaml_entry
from preftune.config.experiment import ExperimentConfig
from preftune.config.help import config_help
from preftune.config.parser import Parsed, parse_with_places
from preftune.errors import ConfigError

USAGE = "preftune config show [CONFIG.yaml] [--key value ...]"
WHAT = (
    "Print the resolved configuration of `preftune train` as YAML that can be run; a comment says "
    "where each value the user gave came from."
)


def run(argv: Sequence[str]) -> int:
    """Show a configuration.

    Args:
        argv: the words after `config`.
    """
    if wants_help(argv):
        print(config_help(ExperimentConfig, USAGE, WHAT), end="")
        return 0
    if not argv or argv[0] != "show":
        said = f"config {argv[0]} is not a command" if argv else "config needs a command"
        raise ConfigError(f"{said}; write: {USAGE}")
    print(annotated(parse_with_places(ExperimentConfig, argv[1:])), end="")
    return 0


def annotated(parsed: Parsed[ComposedConfig]) -> str:
    """The configuration as YAML, with the place of each given value in a comment.

    Args:
        parsed: a configuration and which of its values the user gave.
    """
    lines = []
    for key, value in parsed.config.to_dict().items():
        entry = yaml_entry(key, value)
        given = parsed.given.get(key)
        # A value of several lines keeps its lines: a comment would change it.
        if given is not None and entry.count("\n") == 1:
            entry = f"{entry.rstrip()}  # {given.place}\n"
        lines.append(entry)
    return "".join(lines)
