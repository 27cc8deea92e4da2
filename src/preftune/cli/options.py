"""What the commands share: reading options, and `--help`."""

import os
import sys
from collections.abc import Sequence
from typing import TypeVar

from preftune.config.accelerate import take_from_accelerate
from preftune.config.composed import ComposedConfig
from preftune.config.help import config_help
from preftune.config.parser import parse_config
from preftune.errors import ConfigError

_C = TypeVar("_C", bound=ComposedConfig)

_HELP = ("--help", "-h")


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in _HELP for word in argv)


def options_or_help(
    cls: type[_C],
    argv: Sequence[str],
    usage: str,
    description: str,
    *,
    allow_file: bool = True,
    for_ranks: bool = False,
) -> _C | None:
    """The configuration a command line asks for, or None after printing the help it asks for.

    Args:
        cls: the command's configuration.
        argv: the words after the command.
        usage: how the command is called.
        description: what it does.
        allow_file: whether it takes a config file.
        for_ranks: whether the command's processes, if a launcher starts several, work together:
            what one of them finds wrong then ends all.

    Raises:
        ConfigError: with every mistake found.
    """
    if wants_help(argv):
        print(config_help(cls, usage, description), end="")
        return None
    # Before anything that would act on the variables itself.
    launcher = take_from_accelerate(os.environ) if for_ranks else None
    try:
        config = parse_config(cls, argv, allow_file=allow_file, launcher=launcher)
    except ConfigError as error:
        if for_ranks and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from preftune.distributed.runtime import tell_peers

            tell_peers(error)
        raise
    if launcher is not None and str(launcher) and os.environ.get("RANK", "0") == "0":
        print(f"preftune: {launcher}", file=sys.stderr, flush=True)
    return config
