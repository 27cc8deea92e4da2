"""What follows `--` on the command line of `preftune launch`: the command to run, checked."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from preftune import __version__
from preftune.config.accelerate import from_accelerate
from preftune.config.composed import ComposedConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.config.score import ScoreConfig
from preftune.config.verifying import VerifyResumeConfig
from preftune.errors import ConfigError

COMMANDS: dict[str, type[ComposedConfig]] = {
    "train": ExperimentConfig,
    "cache build": ExperimentConfig,
    "score": ScoreConfig,
    "verify-resume": VerifyResumeConfig,
}
"""What can be launched, and its options."""
_GROUPS = ("sequence_parallel_size", "fsdp_shard_size", "zero_hpz_partition_size")
"""Options that cut the processes into groups of a size."""


@dataclass(frozen=True)
class Program:
    """A command of preftune whose options are right."""

    words: tuple[str, ...]
    config: ComposedConfig

    @property
    def command(self) -> list[str]:
        """What each process runs."""
        return [sys.executable, "-m", "preftune", *self.words]

    @property
    def output(self) -> Path | None:
        """The folder of the run, for a command that has one."""
        folder = getattr(self.config, "output_dir", None)
        return None if folder is None else Path(folder).expanduser()

    @property
    def digest(self) -> str:
        """Equal on hosts that run the same command, by the same version of preftune."""
        text = json.dumps([__version__, self.words, self.config.to_dict()], default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def again(self) -> "Program":
        """The same command after it was cut off: one that may not resume goes on all the same."""
        if getattr(self.config, "resume", None) != "never":
            return self
        words = list(self.words)
        for index, word in enumerate(words):
            if word == "--resume":
                del words[index : index + 2]
                break
            if word.startswith("--resume="):
                del words[index]
                break
        return Program((*words, "--resume", "auto"), self.config)


def parse_program(words: Sequence[str]) -> Program:
    """Check a command line of preftune, without running anything.

    Args:
        words: what follows `--`.

    Raises:
        ConfigError: it cannot be launched, or has mistakes; all of them are told.
    """
    size = 2 if words[:1] == ["cache"] else 1
    name, rest = " ".join(words[:size]), list(words[size:])
    if not name:
        raise ConfigError(
            "launch needs a command to run; write it after --, such as: preftune launch local "
            "--num_processes 2 -- train CONFIG.yaml"
        )
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give {', '.join(COMMANDS)}"
        raise ConfigError(f"after --: {name} is not a command that launch can run; {hint}")
    launcher = from_accelerate(os.environ)  # which the processes inherit
    return Program(tuple(words), parse_config(COMMANDS[name], rest, launcher=launcher))


def check_world_size(program: Program, world_size: int) -> None:
    """See that a command can be run by so many processes.

    Args:
        program: the command.
        world_size: the processes of all hosts.

    Raises:
        ConfigError: it cannot; says which option is in the way.
    """
    for key in _GROUPS:
        size = getattr(program.config, key, None) or 1
        if world_size % size:
            raise ConfigError(
                f"{key} is {size}, and {world_size} processes are launched, which do not part into "
                f"groups of that size; change --num_processes or --{key}"
            )
