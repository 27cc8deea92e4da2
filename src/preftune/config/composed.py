"""Sections merged into one flat configuration that is right or does not exist."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, ClassVar

import yaml

from preftune import __version__
from preftune.config.problem import InvalidConfig, Problem
from preftune.config.section import Section
from preftune.config.typed import reader_of

VERSION_KEY = "preftune_version"
"""Key of a config file, and of no option: the version that wrote it."""


class ComposedConfig:
    """Base of configurations made of sections; list it first, then the sections.

    Building one checks the type of every value, resolves the defaults that follow from others,
    asks every section for its problems, and raises them all at once.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    takes_presets = False  # whether its options may start from a preset
    yaml_options: ClassVar[Collection[str]] = ()  # lists that may hold paths of .yaml files

    def __post_init__(self) -> None:
        """Check and resolve.

        Raises:
            InvalidConfig: with every problem found.
        """
        found = self._check_types()
        mistyped = {problem.key for problem in found}
        for section in sections(type(self)):
            section.__post_init__(self)  # pyright: ignore[reportArgumentType]
        self.resolve()
        for section in sections(type(self)):
            found += section.problems(self)  # pyright: ignore[reportArgumentType]
        found += self.cross_problems()
        # A mistyped value was replaced by its default above, so what follows from it is no news.
        reported = [
            problem
            for index, problem in enumerate(found)
            if index < len(mistyped) or mistyped.isdisjoint((problem.key, *problem.others))
        ]
        if reported:
            raise InvalidConfig(reported)

    def resolve(self) -> None:
        """Fill the defaults that depend on several sections."""

    def cross_problems(self) -> list[Problem]:
        """Everything wrong between sections."""
        return []

    def unread(self) -> Collection[str]:
        """Settings that nothing reads beside the others; problems refuse other values of them."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """The settings that apply, as plain values, in the order of the sections.

        What is unset and unset by default is left out, so an explicit null stays.
        """
        values, unread = {}, self.unread()
        for field in section_fields(type(self)):
            if field.name in unread:
                continue
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                values[field.name] = _plain(value)
        return values

    def to_yaml(self, written: Callable[[Any], Any] = lambda value: value) -> str:
        """`to_dict` as YAML that reads back into an equal configuration; names our version.

        Args:
            written: what to write in place of a value.
        """
        values = {VERSION_KEY: __version__} | self.to_dict()
        return "".join(yaml_entry(key, written(value)) for key, value in values.items())

    def _check_types(self) -> list[Problem]:
        reader = reader_of(type(self))
        found = []
        for field in section_fields(type(self)):
            value = getattr(self, field.name)
            try:
                setattr(self, field.name, reader.read(field.name, value))
            except ValueError as error:
                found.append(Problem(field.name, value, str(error)))
                setattr(self, field.name, default_of(field))
        return found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def sections(config: type) -> Iterator[type[Section]]:
    """The sections a configuration is composed of, in the order they are listed."""
    for base in config.__bases__:
        if issubclass(base, ComposedConfig):
            yield from sections(base)
        elif issubclass(base, Section):
            yield base


def section_fields(config: type) -> list[Field[Any]]:
    """The fields of a configuration, section by section, then its own."""
    known = {field.name: field for field in fields(config)}
    ordered = [f.name for section in sections(config) for f in fields(section)]
    return [known[name] for name in dict.fromkeys([*ordered, *known])]


def default_of(field: Field[Any]) -> Any:
    """A field's default value."""
    return None if field.default is MISSING else field.default


def yaml_entry(key: str, value: Any) -> str:
    """One `key: value` line of YAML, never folded."""
    held = [*value, *value.values()] if isinstance(value, dict) else value
    texts = map(str, held if isinstance(held, list) else [held])
    return yaml.safe_dump(
        {key: value},
        allow_unicode=True,
        sort_keys=False,
        # Unless told to escape, PyYAML writes U+0085 as a line break, which reads as a space.
        default_style=None if all(map(str.isprintable, texts)) else '"',
        # None puts the innermost mapping or list in brackets: what is inside, not the entry.
        default_flow_style=None if isinstance(value, dict | list) else False,
        width=float("inf"),
    )
