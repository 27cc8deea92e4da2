"""A config file and a command line become a checked configuration, or all their mistakes at once.

The command line wins over the file, the file over the defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, get_origin

from preftune.config.commandline import split_words
from preftune.config.composed import ComposedConfig
from preftune.config.problem import InvalidConfig, Problem, shown
from preftune.config.typed import TypedReader, reader_of
from preftune.config.yamlfile import read_inline, read_yaml
from preftune.errors import ConfigError

_C = TypeVar("_C", bound=ComposedConfig)


@dataclass(frozen=True)
class Given:
    """A value the user gave, and where."""

    value: Any
    file: str | None = None
    """The config file; None on the command line."""
    line: int = 0

    @property
    def place(self) -> str:
        """Where, in words."""
        return "command line" if self.file is None else f"{self.file} line {self.line}"

    def name_of(self, key: str) -> str:
        """An option as it is written there."""
        return f"--{key}" if self.file is None else key


@dataclass(frozen=True)
class Parsed(Generic[_C]):
    """A configuration, and which of its values the user gave."""

    config: _C
    given: dict[str, Given]


def parse_config(cls: type[_C], argv: Sequence[str], *, allow_file: bool = True) -> _C:
    """Read `[CONFIG.yaml] [--key value | --key=value ...]`.

    Args:
        cls: the configuration to make.
        argv: the words after the command.
        allow_file: whether a config file may be among them.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: with every mistake found, each with its place.
    """
    return parse_with_places(cls, argv, allow_file=allow_file).config


def parse_with_places(cls: type[_C], argv: Sequence[str], *, allow_file: bool = True) -> Parsed[_C]:
    """As `parse_config`, and say where each value came from.

    Args:
        cls: the configuration to make.
        argv: the words after the command.
        allow_file: whether a config file may be among them.

    Raises:
        ConfigError: with every mistake found, each with its place.
    """
    reader = reader_of(cls)
    words = split_words(argv, lambda name: bool in reader.kinds.get(name, ()))
    if len(words.files) > int(allow_file):
        raise ConfigError(_too_many_files(words.files, allow_file))
    given, problems = _read_file(reader, words.files[0]) if words.files else ({}, [])
    from_line, more = _read_options(reader, words.options)
    given |= from_line
    problems += more
    try:
        config = cls(**{key: found.value for key, found in given.items()})
    except InvalidConfig as error:
        raise ConfigError(problems + _located(error.found, given)) from None
    if problems:
        raise ConfigError(problems)
    return Parsed(config, given)


def _read_file(reader: TypedReader, path: str) -> tuple[dict[str, Given], list[str]]:
    given, problems = {}, []
    for entry in read_yaml(path):
        found = Given(entry.value, path, entry.line)
        if entry.key not in reader.kinds:
            problems.append(f"{found.place}: {_unknown(entry.key, reader.kinds, str)}")
        elif entry.key in given:
            first = given[entry.key].line
            problems.append(
                f"{found.place}: {entry.key} is given twice, first on line {first}; keep one"
            )
        else:
            given[entry.key] = found
    return given, problems


def _read_options(
    reader: TypedReader, options: Sequence[tuple[str, str | bool | None]]
) -> tuple[dict[str, Given], list[str]]:
    given: dict[str, Given] = {}
    problems = []
    for key, text in options:
        if key not in reader.kinds:
            shown_key = key if key.startswith("-") else f"--{key}"
            problems.append(f"command line: {_unknown(shown_key, reader.kinds, '--{}'.format)}")
        elif text is None:
            problems.append(f"command line: --{key} has no value; {reader.allowed(key)}")
        elif key in given:
            was = given[key].value
            problems.append(f"command line: --{key} is given twice, {was!r} and {text!r}; keep one")
        else:
            try:
                given[key] = Given(_meant(text, reader.kinds[key]))
            except ConfigError as error:
                problems.append(f"command line: --{key} is {text!r}; it is {error}")
    return given, problems


def _meant(text: str | bool, kinds: Sequence[Any]) -> Any:
    """What a word stands for where that does not need its field's type: null, or a mapping."""
    if isinstance(text, str) and any(get_origin(kind) is dict for kind in kinds):
        return read_inline(text)
    return None if text == "null" else text


def _unknown(shown: str, known: dict[str, Any], spell: Callable[[str], str]) -> str:
    """What to say of a name that is no option, with the names it may stand for."""
    name = shown.lstrip("-").replace("-", "_").lower()
    near = [key for key in known if len(name) > 2 and key.startswith(name)][:3]
    near = near or get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(map(spell, near))}?" if near else "see --help for all"
    return f"{shown} is not an option; {hint}"


def _located(found: Sequence[Problem], given: dict[str, Given]) -> list[str]:
    """The problems with their places: those of the file by line, the command line, then others."""
    order = {key: index for index, key in enumerate(given)}
    lines = []
    for problem in sorted(found, key=lambda problem: order.get(problem.key, len(order))):
        source = given.get(problem.key)
        if source is None:
            lines.append(str(problem))
        else:
            named = source.name_of(problem.key)
            value = "null" if problem.value is None else shown(problem.value)
            lines.append(f"{source.place}: {named} is {value}; {problem.message}")
    return lines


def _too_many_files(files: Sequence[str], allow_file: bool) -> str:
    if not allow_file:
        return f"command line: {files[0]!r} belongs to no option; options are --key value"
    return f"command line: only one config file can be given, not {', '.join(files)}"
