"""What the commands share: reading options, and `--help`."""

from collections.abc import Sequence
from typing import TypeVar

from preftune.config.composed import ComposedConfig
from preftune.config.help import config_help
from preftune.config.parser import parse_config

_C = TypeVar("_C", bound=ComposedConfig)

_HELP = ("--help", "-h")


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in _HELP for word in argv)


def options_or_help(
    cls: type[_C], argv: Sequence[str], usage: str, description: str, *, allow_file: bool = True
) -> _C | None:
    """The configuration a command line asks for, or None after printing the help it asks for.

    Args:
        cls: the command's configuration.
        argv: the words after the command.
        usage: how the command is called.
        description: what it does.
        allow_file: whether it takes a config file.

    Raises:
        ConfigError: with every mistake found.
    """
    if wants_help(argv):
        print(config_help(cls, usage, description), end="")
        return None
    return parse_config(cls, argv, allow_file=allow_file)
