"""`preftune config`: show, presets, schema, diff."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from preftune import __version__
from preftune.cli.options import wants_help
from preftune.config.composed import VERSION_KEY, yaml_entry
from preftune.config.experiment import ExperimentConfig
from preftune.config.help import config_help
from preftune.config.json_schema import json_schema
from preftune.config.parser import Parsed, parse_config, parse_with_places
from preftune.config.preset import preset_names, preset_path, preset_summary
from preftune.errors import ConfigError

USAGES = {
    "show": "preftune config show [CONFIG.yaml] [--key value ...]",
    "presets": "preftune config presets [NAME]",
    "schema": "preftune config schema",
    "diff": "preftune config diff A B",
}
WHAT = {
    "show": "Print the resolved configuration of `preftune train` as YAML that can be run; a "
    "comment says where each value the user gave came from.",
    "presets": "List the presets, or print the file of one.",
    "schema": "Print the JSON Schema of a config file, for editors.",
    "diff": "Print the resolved values that differ between two config files or run folders.",
}


def run(argv: Sequence[str]) -> int:
    """Show, list, describe or compare configurations.

    Args:
        argv: the words after `config`.
    """
    command, rest = (argv[0], argv[1:]) if argv else ("", ())
    if wants_help(argv):
        print(_help(command), end="")
        return 0
    commands: dict[str, Callable[[Sequence[str]], str]] = {
        "show": show,
        "presets": presets,
        "schema": schema,
        "diff": diff,
    }
    if command not in commands:
        said = f"config {command} is not a command" if command else "config needs a command"
        raise ConfigError(f"{said}; write: preftune config {', '.join(commands)}, with --help")
    print(commands[command](rest), end="")
    return 0


def show(argv: Sequence[str]) -> str:
    """The resolved configuration as YAML, with the place of each given value in a comment."""
    return annotated(parse_with_places(ExperimentConfig, argv))


def presets(argv: Sequence[str]) -> str:
    """Every preset with a line on it, or the file of one."""
    if not argv:
        width = max(map(len, preset_names()))
        return "".join(f"{name:{width}}  {preset_summary(name)}\n" for name in preset_names())
    _expect("presets", argv, 1)
    try:
        return preset_path(argv[0]).read_text(encoding="utf-8")
    except ValueError as error:
        raise ConfigError(f"command line: the preset is {argv[0]!r}; {error}") from None


def schema(argv: Sequence[str]) -> str:
    """The JSON Schema of a config file."""
    _expect("schema", argv, 0)
    return json.dumps(json_schema(ExperimentConfig), indent=2, ensure_ascii=False) + "\n"


def diff(argv: Sequence[str]) -> str:
    """One line a resolved value that differs: key, value of the first, value of the second."""
    _expect("diff", argv, 2)
    first, second = (_resolved(place) for place in argv)
    rows = [
        (key, _flat(first, key), _flat(second, key))
        for key in first | second
        if _flat(first, key) != _flat(second, key)
    ]
    if not rows:
        return f"{argv[0]} and {argv[1]} resolve to the same configuration\n"
    rows.insert(0, ("", argv[0], argv[1]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        f"{key:{widths[0]}}  {left:{widths[1]}}  {right}".rstrip() + "\n"
        for key, left, right in rows
    )


def annotated(parsed: Parsed[Any]) -> str:
    """The configuration as YAML, with the place of each given value in a comment.

    Args:
        parsed: a configuration and which of its values the user gave.
    """
    lines = [yaml_entry(VERSION_KEY, __version__)]
    for key, value in parsed.config.to_dict().items():
        entry = yaml_entry(key, value)
        given = parsed.given.get(key)
        # A value of several lines keeps its lines: a comment would change it.
        if given is not None and entry.count("\n") == 1:
            entry = f"{entry.rstrip()}  # {given.place}\n"
        lines.append(entry)
    return "".join(lines)


def _help(command: str) -> str:
    if command == "show":
        return config_help(ExperimentConfig, USAGES["show"], WHAT["show"])
    if command in USAGES:
        return f"usage: {USAGES[command]}\n\n{WHAT[command]}\n"
    lines = [f"  {usage}\n      {WHAT[name]}\n" for name, usage in USAGES.items()]
    return "usage: preftune config COMMAND ...\n\n" + "".join(lines)


def _expect(command: str, argv: Sequence[str], number: int) -> None:
    if len(argv) != number or any(word.startswith("--") for word in argv):
        said = " ".join(argv) or "nothing"
        raise ConfigError(f"command line: config {command} got {said}; write: {USAGES[command]}")


def _resolved(place: str) -> dict[str, Any]:
    path = Path(place).expanduser()
    file = path / "config.yaml" if path.is_dir() else path
    return parse_config(ExperimentConfig, [str(file)]).to_dict()


def _flat(values: dict[str, Any], key: str) -> str:
    """A value as it would stand in a config file, on one line."""
    if key not in values:
        return "not set"
    text = yaml_entry("x", values[key]).removeprefix("x:").strip()
    return text if "\n" not in text else json.dumps(values[key], ensure_ascii=True)
