"""YAML read as text with line numbers: what a word means is the field's business, not YAML's.

YAML itself would turn an unquoted `no` into False, `5e-7` into text and 010 into 8, keep the last
of two equal keys, and forget where each stood.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from preftune.errors import ConfigError

_NULL = ("", "~", "null", "Null", "NULL")
_DEEPEST = 4
_MOST_VALUES = 100_000
_CORE = "tag:yaml.org,2002:"
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")


@dataclass(frozen=True)
class Entry:
    """One `key: value` of a file."""

    key: str
    value: Any
    """Text, None, or dicts and lists of such."""
    line: int
    """Counted from 1."""
    twice: str | None = None
    """A name that a mapping inside the value holds twice, so that one of them would be lost."""
    node: yaml.Node | None = field(default=None, compare=False, repr=False)
    """What it was read from."""

    def entries(self, path: str) -> list["Entry"]:
        """Those of its value, which must be a mapping, or nothing.

        Args:
            path: the file.

        Raises:
            ConfigError: the value is something else.
        """
        assert self.node is not None
        return [] if self.value is None else _entries(self.node, path, self.key)


def read_yaml(path: str) -> list[Entry]:
    """The top-level entries of a YAML file, in order and with repeated keys.

    Args:
        path: the file.

    Raises:
        ConfigError: the file cannot be read, is not YAML or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: the config file cannot be read: {error.strerror}; "
            "give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: the config file is not UTF-8 text: {error}; save it as UTF-8"
        ) from error
    root = _compose(text, path)
    return [] if root is None else _entries(root, path, "the file")


def _entries(root: yaml.Node, path: str, what: str) -> list[Entry]:
    if not isinstance(root, yaml.MappingNode):
        at = f"{path} line {root.start_mark.line + 1}"
        raise ConfigError(f"{at}: {what} must hold a mapping, one `key: value` a line")
    return [
        Entry(_name(key), _value(value), key.start_mark.line + 1, _name_given_twice(value), value)
        for key, value in root.value
    ]


def read_inline(text: str) -> Any:
    """A value written as YAML on the command line, such as {prompt: question}.

    Args:
        text: the YAML.

    Raises:
        ConfigError: it is not valid YAML, or a mapping holds a name twice.
    """
    root = _compose(text)
    if root is None:
        return None
    if twice := _name_given_twice(root):
        raise ConfigError(f"a mapping that names {twice!r} twice; keep one")
    return _value(root)


def _compose(text: str, path: str | None = None) -> yaml.Node | None:
    place = remedy = ""
    if path is not None:
        place = f"{path}: "
        remedy = "; correct it there (text that holds `: ` or ` #` needs quotes)"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _num_values(root, {}) > _MOST_VALUES:
            raise ConfigError(
                f"it holds more than {_MOST_VALUES} values, which aliases (*name) multiply; "
                "write out what is meant"
            )
        return root
    except ConfigError as error:
        raise ConfigError(f"{place}{error}") from None
    except RecursionError as error:
        raise ConfigError(f"{place}not valid YAML: it is nested too deep{remedy}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if path is not None and mark:
            place = f"{path} line {mark.line + 1}: "
        raise ConfigError(f"{place}not valid YAML: {error.problem}{remedy}") from error
    except yaml.YAMLError as error:  # characters that YAML does not allow; two lines of text
        problem = " ".join(str(error).split())
        raise ConfigError(f"{place}not valid YAML: {problem}{remedy}") from error


def _num_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values under a node, those behind an alias counted each time that it is named.

    Raises:
        ConfigError: one has a tag, which would ask for an object of Python or another program.
    """
    if node.tag.removeprefix(_CORE) not in _TAGS:
        at = f"line {node.start_mark.line + 1}"
        tag = node.tag.replace(_CORE, "!!")
        raise ConfigError(f"{at} has the tag {tag}, which is not read; write the value alone")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # while it is counted: an alias may contain itself
        held = node.value
        if isinstance(node, yaml.MappingNode):
            held = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_num_values(part, known) for part in held)
    return known[id(node)]


def _value(node: yaml.Node, depth: int = 0) -> Any:
    if depth > _DEEPEST:  # No option nests this far; an alias may contain itself.
        return "..."
    if isinstance(node, yaml.MappingNode):
        return {_name(key): _value(value, depth + 1) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, depth + 1) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)
    # style is None for plain words; quoted ones are text whatever they spell.
    return None if node.style is None and node.value in _NULL else node.value


def _name(node: yaml.Node) -> str:
    """The key of a mapping as it is written, whatever YAML takes it for."""
    return node.value if isinstance(node, yaml.ScalarNode) else str(_value(node))


def _name_given_twice(node: yaml.Node, depth: int = 0) -> str | None:
    if depth > _DEEPEST or isinstance(node, yaml.ScalarNode):
        return None
    held = node.value
    if isinstance(node, yaml.MappingNode):
        names = [_name(key) for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            return twice
        held = [value for _, value in node.value]
    return next(filter(None, (_name_given_twice(item, depth + 1) for item in held)), None)
