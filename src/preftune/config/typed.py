"""One typed reader of values for Python, YAML and the command line, built on jsonargparse."""

import math
import os
import re
from dataclasses import fields
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

# Plain decimals only: jsonargparse would read YAML 1.1's 010 as 8 and 1:30 as 90.
_NUMBER = re.compile(r"[+-]?(0|[1-9][\d_]*)?(\.\d*)?([eE][+-]?\d+)?", re.ASCII)


class AlsoSpelled:
    """Annotation of a field: other words for its values, such as "no" for "fp32"."""

    def __init__(self, **words: str) -> None:
        """Keep the words.

        Args:
            words: word=value it stands for.
        """
        self.words = words


class TypedReader:
    """Reads a value for a field: one of its type, or text that stands for one."""

    def __init__(self, config: type) -> None:
        """Prepare one jsonargparse argument a field.

        Args:
            config: the dataclass whose fields to read.
        """
        hints = get_type_hints(config, include_extras=True)
        self.defaults = {field.name: field.default for field in fields(config)}
        self.kinds = {name: alternatives(hints[name]) for name in self.defaults}
        self._spellings = {name: _spellings(hints[name]) for name in self.defaults}
        self._parser = ArgumentParser(exit_on_error=False)
        for name, hint in get_type_hints(config).items():
            if name in self.defaults:
                self._parser.add_argument(f"--{name}", type=hint)

    def read(self, name: str, value: Any) -> Any:
        """The value in the field's type.

        Args:
            name: the field.
            value: what the user gave.

        Raises:
            ValueError: saying what the field allows.
        """
        kinds = self.kinds[name]
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            value = self._spellings[name].get(value, value)
            if str in kinds and value:
                return value
        if not self._may_be_read(value, kinds):
            raise ValueError(self.allowed(name))
        try:
            if enum := next((kind for kind in kinds if _is_enum(kind)), None):
                return enum(value)  # jsonargparse knows members by name, users by value
            return self._parser.parse_object({name: value}, defaults=False)[name]
        except (ArgumentError, TypeError, ValueError):
            # jsonargparse's own text shows types; ours says what to write.
            raise ValueError(self.allowed(name)) from None

    def allowed(self, name: str) -> str:
        """What a field may hold, to follow "key is value; "."""
        kinds, default = self.kinds[name], self.defaults[name]
        words = [word for kind in kinds for word in _words(kind)]
        if int in kinds and float in kinds:
            words.remove("a whole number")
        if type(default) in kinds and type(default) in (int, float):
            words[0] += f" such as {default!r}"
        if NoneType in kinds:
            words.append("null")
        *most, last = words
        return f"it must be {', '.join(most)}{' or ' if most else ''}{last}"

    @staticmethod
    def _may_be_read(value: Any, kinds: tuple[Any, ...]) -> bool:
        """Whether jsonargparse may see a value: it is more liberal than is good for users."""
        if value is None:
            return NoneType in kinds
        if isinstance(value, float):
            return math.isfinite(value)
        if not isinstance(value, str):
            return True
        if any(value in _words(kind) for kind in kinds if get_origin(kind) is Literal):
            return True
        if int in kinds or float in kinds:
            return any(map(str.isdigit, value)) and _NUMBER.fullmatch(value) is not None
        return bool(value)


@cache
def reader_of(config: type) -> TypedReader:
    """The reader of a configuration class, built once."""
    return TypedReader(config)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type there is."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        return tuple(kind for part in get_args(hint) for kind in alternatives(part))
    return (hint,)


def _spellings(hint: Any) -> dict[str, str]:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((extra.words for extra in extras if isinstance(extra, AlsoSpelled)), {})


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _words(kind: Any) -> list[str]:
    """A type in words; one word a value where the values are few. null has none."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is dict:
        return ["a mapping of names to names, such as {name: other}"]
    if _is_enum(kind):
        return [member.value for member in kind]
    names = {bool: ["true", "false"], int: ["a whole number"], float: ["a finite number"]}
    names |= {str: ["text"], NoneType: []}
    return names[kind]
