"""The JSON Schema of a config file, from which editors complete and check.

It describes what the parser reads, not more: editors read YAML 1.2, where `no` is text and `5e-7` a
number, and the parser takes the text of any value. JSON Schema cannot tell 1.0 from 1, so where a
whole number is due it accepts both. Rules between settings, and most ranges, are the parser's.
"""

import math
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from preftune.config.composed import VERSION_KEY, ComposedConfig, default_of, section_fields
from preftune.config.docs import field_docs
from preftune.config.preset import PRESET_DOC, PRESET_KEY, preset_names
from preftune.config.typed import DECIMAL, INTEGER, alternatives, reader_of
from preftune.losses.knobs import KNOBS, Knob

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SWITCH = r"^([Tt]rue|TRUE|[Ff]alse|FALSE|[Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$"
# YAML words of another type are text where text is due: a revision 010, a folder called no.
_TEXT = {"type": ["string", "number", "boolean"], "minLength": 1}


def json_schema(config: type[ComposedConfig]) -> dict[str, Any]:
    """The JSON Schema of the YAML file of a configuration.

    Args:
        config: its class.

    Returns:
        The schema, as plain values; every key has a description.
    """
    properties: dict[str, Any] = {
        field.name: _property(config, field.name, default_of(field))
        for field in section_fields(config)
    }
    version = "The version of preftune that wrote the file; a newer one's is refused."
    properties[VERSION_KEY] = {"description": version, "type": ["string", "number"]}
    if config.takes_presets:
        names = [*preset_names(), None]
        properties[PRESET_KEY] = {"description": PRESET_DOC, "enum": names}
    return {
        "$schema": _DIALECT,
        "title": f"preftune {config.__name__}",
        "type": ["object", "null"],  # an empty file is one without settings
        "properties": properties,
        "additionalProperties": False,
    }


def _property(config: type[ComposedConfig], name: str, default: Any) -> dict[str, Any]:
    reader = reader_of(config)
    allowed = [schema for kind in reader.kinds[name] for schema in _schemas(kind)]
    if words := list(reader.spellings[name]):
        allowed.append({"enum": words})
    if name in KNOBS:
        allowed = [_in_range(schema, KNOBS[name]) for schema in allowed]
    described = {"description": field_docs(config).get(name, "")}
    if default is not None:
        described["default"] = default.value if isinstance(default, Enum) else default
    return described | (allowed[0] if len(allowed) == 1 else {"anyOf": allowed})


def _schemas(kind: Any) -> list[dict[str, Any]]:
    """What a value of one type may look like in YAML."""
    if kind is NoneType:
        return [{"type": "null"}]
    if kind is bool:
        return [{"type": "boolean"}, {"type": "string", "pattern": _SWITCH}]
    if kind is int:
        return [{"type": "integer"}, {"type": "string", "pattern": INTEGER}]
    if kind is float:
        return [{"type": "number"}, {"type": "string", "pattern": DECIMAL}]
    if kind is str:
        return [_TEXT]
    if get_origin(kind) is Literal:
        return [{"enum": list(get_args(kind))}]
    if get_origin(kind) is list:
        item = _any_of(get_args(kind)[0])
        return [{"type": "array", "items": item}, item]
    if get_origin(kind) is dict:
        held = _any_of(get_args(kind)[1])
        names = {"minLength": 1}
        return [{"type": "object", "propertyNames": names, "additionalProperties": held}]
    return [{"enum": [member.value for member in kind]}]


def _any_of(hint: Any) -> dict[str, Any]:
    allowed = [schema for kind in alternatives(hint) for schema in _schemas(kind)]
    return allowed[0] if len(allowed) == 1 else {"anyOf": allowed}


def _in_range(schema: dict[str, Any], knob: Knob) -> dict[str, Any]:
    if schema.get("type") != "number":
        return schema
    bounds, numbers = {}, knob.numbers
    if math.isfinite(numbers.low):
        bounds["exclusiveMinimum" if numbers.low_open else "minimum"] = numbers.low
    if math.isfinite(numbers.high):
        bounds["exclusiveMaximum" if numbers.high_open else "maximum"] = numbers.high
    return schema | bounds
