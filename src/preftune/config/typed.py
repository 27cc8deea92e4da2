"""One typed reader of values for Python, YAML and the command line, built on jsonargparse."""

import math
import os
import re
from dataclasses import fields
from enum import Enum
from functools import cache, reduce
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

# Plain decimals only: jsonargparse would read YAML 1.1's 010 as 8 and 1:30 as 90. The JSON Schema
# of config files takes them over.
INTEGER = r"^[+-]?(0|[1-9][0-9_]*)$"
DECIMAL = r"^[+-]?((0|[1-9][0-9_]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"


class AlsoSpelled:
    """Annotation of a field: other words for its values, such as "no" for "fp32"."""

    def __init__(self, **words: str | None) -> None:
        """Keep the words.

        Args:
            words: word=value it stands for; None is null.
        """
        self.words = words


class TypedReader:
    """Reads a value for a field: one of its type, or text that stands for one."""

    def __init__(self, config: type) -> None:
        """Look up the type of each field.

        Args:
            config: the dataclass whose fields to read.
        """
        hints = get_type_hints(config, include_extras=True)
        self.defaults = {field.name: field.default for field in fields(config)}
        self.kinds = {name: alternatives(hints[name]) for name in self.defaults}
        self.spellings = {name: _spellings(hints[name]) for name in self.defaults}

    def read(self, name: str, value: Any) -> Any:
        """The value in the field's type.

        Args:
            name: the field.
            value: what the user gave.

        Raises:
            ValueError: saying what the field allows.
        """
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            value = self.spellings[name].get(value, value)
        try:
            return read_as(value, self.kinds[name])
        except ValueError:
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


def read_as(value: Any, kinds: tuple[Any, ...]) -> Any:
    """A value as one of several types; text may stand for any of them.

    A single text is a list of one where only a list is asked for. Inside lists and mappings, too,
    the type says what a word means: 1 is a whole number, 1.0 is not.

    Args:
        value: what the user gave.
        kinds: the types, as `alternatives` gives them.

    Raises:
        ValueError: it is none of them; without a text for users.
    """
    of_items = next((get_args(kind) for kind in kinds if get_origin(kind) is list), None)
    of_entries = next((get_args(kind) for kind in kinds if get_origin(kind) is dict), None)
    if of_entries and isinstance(value, dict):
        key, item = map(alternatives, of_entries)
        return {read_as(name, key): read_as(held, item) for name, held in value.items()}
    enum = next((kind for kind in kinds if _is_enum(kind)), None)
    if of_items:
        if isinstance(value, str) and str not in kinds and not enum:
            value = [value]
        if isinstance(value, list | tuple):
            return [read_as(held, alternatives(of_items[0])) for held in value]
    plain = tuple(kind for kind in kinds if get_origin(kind) not in (list, dict))
    if isinstance(value, str) and str in plain and value:
        return value
    if not _may_be_read(value, plain):
        raise ValueError
    if enum and value is not None:
        return enum(value)  # jsonargparse knows members by name, users by value
    try:
        read = _parser_of(plain).parse_object({"value": value}, defaults=False)["value"]
    except (ArgumentError, TypeError, ValueError):
        raise ValueError from None  # jsonargparse's own text shows types; ours says what to write
    if isinstance(read, float) and not math.isfinite(read):  # 1e999
        raise ValueError
    return read


def number(text: str) -> int | float:
    """A number as it is written: 1 is a whole number, 1.0 is not.

    Args:
        text: the number.

    Raises:
        ValueError: it is no finite number.
    """
    return read_as(text, (int, float))


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
        # strip: $ would let a line break at the end pass
        return re.match(DECIMAL, value) is not None and value == value.strip()
    return bool(value)


@cache
def _parser_of(kinds: tuple[Any, ...]) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=reduce(or_, kinds))
    return parser


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


def _spellings(hint: Any) -> dict[str, str | None]:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((extra.words for extra in extras if isinstance(extra, AlsoSpelled)), {})


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _words(kind: Any) -> list[str]:
    """A type in words; one word a value where the values are few. null has none."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    if get_origin(kind) is dict:
        held = "{name: other}" if str in alternatives(get_args(kind)[1]) else "{name: 0.5}"
        return [f"a mapping such as {held}"]
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        if get_origin(item) is Literal:
            return list(get_args(item))
        return ["a list of them" if _is_enum(item) else "a list such as [a, b]"]
    if _is_enum(kind):
        return [member.value for member in kind]
    names = {bool: ["true", "false"], int: ["a whole number"], float: ["a finite number"]}
    names |= {str: ["text"], NoneType: []}
    return names[kind]
