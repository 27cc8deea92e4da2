"""A config file and a command line become a checked configuration, or all their mistakes at once.

The command line wins over the file, the file over a preset, a preset over the defaults. What
Accelerate's configuration says must not contradict any of them but the defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Generic, TypeVar, get_origin

from packaging.version import InvalidVersion, Version

from preftune import __version__
from preftune.config.accelerate import FromAccelerate, Taken
from preftune.config.commandline import split_words
from preftune.config.composed import VERSION_KEY, ComposedConfig
from preftune.config.preset import PRESET_KEY, preset_entries
from preftune.config.problem import InvalidConfig, Problem, shown
from preftune.config.typed import TypedReader, reader_of
from preftune.config.yamlfile import Entry, read_inline, read_yaml
from preftune.errors import ConfigError

_C = TypeVar("_C", bound=ComposedConfig)
# Stands for a value that could not be read, which is told already: no type accepts it, and what
# only follows from it is not told.
_UNREAD = object()


@dataclass(frozen=True)
class Given:
    """A value the user gave, and where."""

    value: Any
    file: str | None = None
    """The config file; None on the command line and in a preset."""
    line: int = 0
    preset: str | None = None
    """The preset; the user gave its name only."""
    launcher: str | None = None
    """The setting of the launcher that stands for it."""

    @property
    def place(self) -> str:
        """Where, in words."""
        if self.launcher is not None:
            return self.launcher
        if self.preset is not None:
            return f"preset {self.preset}"
        return "command line" if self.file is None else f"{self.file} line {self.line}"

    def name_of(self, key: str) -> str:
        """An option as it is written there."""
        elsewhere = (self.file, self.preset, self.launcher)
        return f"--{key}" if elsewhere == (None, None, None) else key


@dataclass(frozen=True)
class Parsed(Generic[_C]):
    """A configuration, and which of its values the user gave, by himself or by a preset."""

    config: _C
    given: dict[str, Given]

    @property
    def defaulted(self) -> dict[str, Any]:
        """The settings that apply and that nobody gave: defaults, and what follows from others."""
        given = {key for key, found in self.given.items() if found.value is not None}
        values = self.config.to_dict()
        return {k: v for k, v in values.items() if v is not None and k not in given}


def parse_config(
    cls: type[_C],
    argv: Sequence[str],
    *,
    allow_file: bool = True,
    launcher: FromAccelerate | None = None,
) -> _C:
    """Read `[CONFIG.yaml] [--key value | --key=value ...]`.

    Args:
        cls: the configuration to make.
        argv: the words after the command.
        allow_file: whether a config file may be among them.
        launcher: what the launcher of the processes says of their options.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: with every mistake found, each with its place.
    """
    return parse_with_places(cls, argv, allow_file=allow_file, launcher=launcher).config


def parse_with_places(
    cls: type[_C],
    argv: Sequence[str],
    *,
    allow_file: bool = True,
    launcher: FromAccelerate | None = None,
) -> Parsed[_C]:
    """As `parse_config`, and say where each value came from.

    Args:
        cls: the configuration to make.
        argv: the words after the command.
        allow_file: whether a config file may be among them.
        launcher: what the launcher of the processes says of their options.

    Raises:
        ConfigError: with every mistake found, each with its place.
    """
    reader = reader_of(cls)
    known = [*reader.kinds, *([PRESET_KEY] if cls.takes_presets else [])]
    if "progress" in known:
        argv = ["--progress=none" if word == "--quiet" else word for word in argv]
    words = split_words(
        argv,
        is_switch=lambda name: bool in reader.kinds.get(name, ()),
        is_list=lambda name: _takes(list, reader.kinds.get(name, ())),
        takes_yaml=lambda name: name in cls.yaml_options,
    )
    if len(words.files) > int(allow_file):
        raise ConfigError(_too_many_files(words.files, allow_file))
    given, problems = _read_file(known, words.files[0]) if words.files else ({}, [])
    from_line, more = _read_options(reader, known, words.options)
    given |= from_line
    without_preset = _add_preset(given)
    problems += more + without_preset
    if launcher is not None:
        problems += launcher.problems + _add_taken(reader, given, launcher.taken)
    return Parsed(_made(cls, given, problems, without_preset), given)


def config_of(cls: type[_C], given: dict[str, Given]) -> _C:
    """A configuration of values whose places are known; a preset among them is read.

    Args:
        cls: the configuration to make.
        given: by option; gets what a preset sets.

    Raises:
        ConfigError: with every mistake found, each with its place.
    """
    without_preset = _add_preset(given)
    return _made(cls, given, without_preset, without_preset)


def _made(
    cls: type[_C],
    given: dict[str, Given],
    problems: list[str],
    without_preset: list[str],
) -> _C:
    """The configuration, or all that is wrong: what is told already, and what it finds itself."""
    try:
        config = cls(**{key: found.value for key, found in given.items()})
    except InvalidConfig as error:
        # What is not given at all, the preset that is not known might have given.
        found = [p for p in error.found if not without_preset or p.key in given]
        raise ConfigError(problems + _located(found, given)) from None
    if problems:
        raise ConfigError(problems)
    return config


def unknown_option(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is no option, with the names it may stand for."""
    return _unknown(name, known, str)


def _read_file(known: Sequence[str], path: str) -> tuple[dict[str, Given], list[str]]:
    given, problems = {}, []
    for entry in read_yaml(path):
        found = Given(entry.value, path, entry.line)
        if entry.key in given:
            first = given[entry.key].line
            problems.append(
                f"{found.place}: {entry.key} is given twice, first on line {first}; keep one"
            )
        elif entry.key == VERSION_KEY:
            problems += _version_problems(entry, found.place)
        elif entry.key not in known:
            problems.append(f"{found.place}: {_unknown(entry.key, known, str)}")
        elif entry.twice is not None:
            problems.append(f"{found.place}: {entry.key} names {entry.twice!r} twice; keep one")
            given[entry.key] = Given(_UNREAD, path, entry.line)
        else:
            given[entry.key] = found
    return given, problems


def _version_problems(entry: Entry, place: str) -> list[str]:
    said = f"{place}: {VERSION_KEY} is {shown(entry.value)}"
    try:
        newer = Version(str(entry.value)) > Version(__version__)
    except InvalidVersion:
        return [f"{said}; it must be a version such as {__version__}, or remove the line"]
    if not newer:
        return []
    remedy = "upgrade preftune, or remove the line to read it anyway"
    return [f"{said}, which is newer than this preftune, {__version__}; {remedy}"]


def _add_preset(given: dict[str, Given]) -> list[str]:
    """Replace the name of a preset by what it sets and the user does not."""
    if PRESET_KEY not in given or given[PRESET_KEY].value is None:
        given.pop(PRESET_KEY, None)
        return []
    found = given.pop(PRESET_KEY)
    try:
        entries = preset_entries(str(found.value), {k: held.value for k, held in given.items()})
    except ValueError as error:
        named = found.name_of(PRESET_KEY)
        return [f"{found.place}: {named} is {shown(found.value)}; {error}"]
    for entry in entries:
        given[entry.key] = Given(entry.value, preset=str(found.value))
    return []


def _add_taken(reader: TypedReader, given: dict[str, Given], taken: Sequence[Taken]) -> list[str]:
    """Add what the launcher says; what contradicts it is told."""
    problems = []
    for item in taken:
        if item.key not in reader.kinds:
            continue  # not of this command
        found = given.get(item.key)
        if found is None or found.value in (None, "auto"):
            given[item.key] = Given(item.value, launcher=item.place)
            continue
        try:
            values = [reader.read(item.key, value) for value in (found.value, item.value)]
        except ValueError:
            continue  # told where the types are checked
        if values[0] != values[1]:
            problems.append(
                f"{found.place}: {found.name_of(item.key)} is {shown(values[0])}, and {item.place} "
                f"in Accelerate's configuration, which stands for {shown(values[1])}; keep one"
            )
    return problems


def _read_options(
    reader: TypedReader,
    known: Sequence[str],
    options: Sequence[tuple[str, str | list[str] | bool | None]],
) -> tuple[dict[str, Given], list[str]]:
    given: dict[str, Given] = {}
    problems = []
    for key, text in options:
        if key not in known:
            shown_key = key if key.startswith("-") else f"--{key}"
            problems.append(f"command line: {_unknown(shown_key, known, '--{}'.format)}")
        elif text is None:
            allowed = "see `preftune config presets`"
            allowed = allowed if key == PRESET_KEY else reader.allowed(key)
            problems.append(f"command line: --{key} has no value; {allowed}")
            given.setdefault(key, Given(None if key == PRESET_KEY else _UNREAD))
        elif key in given:
            was = given[key].value
            problems.append(f"command line: --{key} is given twice, {was!r} and {text!r}; keep one")
        else:
            try:
                given[key] = Given(_meant(text, reader.kinds.get(key, ())))
            except ConfigError as error:
                problems.append(f"command line: --{key} is {text!r}; it is {error}")
                given[key] = Given(_UNREAD)
    return given, problems


def _meant(text: str | list[str] | bool, kinds: Sequence[Any]) -> Any:
    """What a word stands for where that does not need its field's type: null, mappings, lists."""
    if isinstance(text, str):
        opening = text.lstrip()[:1]
        # Where plain text is allowed, too, only a bracket says that it is none.
        if _takes(dict, kinds) and (str not in kinds or opening == "{"):
            return read_inline(text)
        if _takes(list, kinds) and opening == "[":
            return read_inline(text)
    return None if text == "null" else text


def _takes(container: type, kinds: Sequence[Any]) -> bool:
    return any(get_origin(kind) is container for kind in kinds)


def _unknown(shown: str, known: Sequence[str], spell: Callable[[str], str]) -> str:
    """What to say of a name that is no option, with the names it may stand for."""
    name = shown.lstrip("-").replace("-", "_").lower()
    longer = [key for key in known if len(name) > 2 and key.startswith(name)]
    near = [name] if name in known else longer[:3]
    near = near or get_close_matches(name, known, n=1)
    hint = f"did you mean {' or '.join(map(spell, near))}?" if near else "see --help for all"
    return f"{shown} is not an option; {hint}"


def _located(found: Sequence[Problem], given: dict[str, Given]) -> list[str]:
    """The problems with their places: those of the file by line, the command line, then others."""
    order = {key: index for index, key in enumerate(given)}
    lines = []
    found = [problem for problem in found if problem.value is not _UNREAD]
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
    said = f"command line: only one config file can be given, not {', '.join(files)}"
    return f"{said}; put all settings into one, or give those of the other as --key value"
