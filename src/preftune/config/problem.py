"""One thing wrong with a configuration, and the error that holds all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from preftune.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    """One value that cannot be used."""

    key: str
    """Name of the option."""
    value: Any
    """What it holds; None reads as "not set"."""
    message: str
    """What is allowed, or what to do; goes on from "key is value;"."""
    others: tuple[str, ...] = ()
    """Options the problem also depends on: where one of them is wrong itself, only that is told."""

    def __str__(self) -> str:
        """The sentence a user reads, without the place."""
        return f"{self.key} is {shown(self.value)}; {self.message}"


class InvalidConfig(ConfigError):
    """A `ConfigError` that keeps the problems apart, so that the parser can add file and line."""

    def __init__(self, found: Sequence[Problem]) -> None:
        """Keep the problems.

        Args:
            found: every problem of the configuration.
        """
        self.found = list(found)
        super().__init__([str(problem) for problem in found])


def shown(value: Any) -> str:
    """A value as the user would write it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return repr(value.value)
    return repr(value)


def listed(names: Sequence[Any]) -> str:
    """Names as a sentence has them: `a, b or c`."""
    *most, last = map(str, names)
    return f"{', '.join(most)} or {last}" if most else last


def below(key: str, value: float | None, least: float, message: str) -> list[Problem]:
    """The problem of a number that is under `least`; an unset number has none."""
    return [Problem(key, value, message)] if value is not None and value < least else []


def count(key: str, value: int | None, least: int = 1) -> list[Problem]:
    """The problem of a count that is too small."""
    return below(key, value, least, f"it must be {least} or more")


def sbatch_option_problems(key: str, options: Sequence[str] | None) -> list[Problem]:
    """The problems of options for sbatch, which become lines of a script."""
    return [
        Problem(key, options, f"{option!r} is no option: each starts with - and stands on one line")
        for option in options or ()
        if not option.startswith("-") or "\n" in option
    ]
