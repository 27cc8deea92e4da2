"""`--help`: every option under its section, with the docstring of its field."""

import argparse
from enum import EnumType
from typing import Any, Literal, get_args, get_origin

from preftune.config.composed import ComposedConfig, default_of, section_fields, sections
from preftune.config.docs import field_docs
from preftune.config.preset import PRESET_DOC, PRESET_KEY, preset_names
from preftune.config.problem import shown
from preftune.config.typed import alternatives, reader_of


def config_help(config: type[ComposedConfig], usage: str, description: str) -> str:
    """The help text of a command that takes a configuration.

    Args:
        config: its configuration.
        usage: how it is called, without "usage:".
        description: what it does.
    """
    parser = argparse.ArgumentParser(usage=usage, description=description, allow_abbrev=False)
    if config.takes_presets:
        group = parser.add_argument_group("Where the settings start from")
        group.add_argument(f"--{PRESET_KEY}", metavar="|".join(preset_names()), help=PRESET_DOC)
    ordered = {field.name: field for field in section_fields(config)}
    for section in sections(config):
        group = parser.add_argument_group(_first_line(section))
        for name in [name for name in ordered if name in section.__dataclass_fields__]:
            field = ordered.pop(name)
            default = default_of(field)
            text = field_docs(config).get(name, "")
            text += f" (default: {_plain(default)})" if default is not None else ""
            group.add_argument(f"--{name}", metavar=_metavar(config, name), help=_escape(text))
    return parser.format_help()


def _first_line(section: type) -> str:
    return (section.__doc__ or section.__name__).splitlines()[0].rstrip(".")


def _plain(default: Any) -> str:
    return str(default) if isinstance(default, str) else shown(default)


def _metavar(config: type, name: str) -> str:
    kinds = reader_of(config).kinds[name]
    if mapping := next((kind for kind in kinds if get_origin(kind) is dict), None):
        shape = "{NAME: OTHER}" if str in alternatives(get_args(mapping)[1]) else "{NAME: NUMBER}"
        return f"TEXT|{shape}" if str in kinds else shape
    if several := next((kind for kind in kinds if get_origin(kind) is list), None):
        item = get_args(several)[0]
        words = get_args(item) if get_origin(item) is Literal else _members(item)
        return f"{'|'.join(words) or 'TEXT'} ..."
    if bool in kinds:
        return "[true|false]"
    if float in kinds or int in kinds:
        return "NUMBER"
    if str in kinds:
        return "TEXT"
    return "|".join(str(word) for kind in kinds for word in get_args(kind) or _members(kind))


def _members(kind: Any) -> list[str]:
    return [str(member) for member in kind] if isinstance(kind, EnumType) else []


def _escape(text: str) -> str:
    """Argparse fills in % forms."""
    return text.replace("%", "%%")
