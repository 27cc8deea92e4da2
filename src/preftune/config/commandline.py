"""The command line as words: which option got which text. No abbreviations, no silence."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_BOOLEANS = ("true", "false", "yes", "no", "on", "off")
_NEGATIVE_NUMBER = re.compile(r"-\.?\d.*")


@dataclass
class Words:
    """What stands on a command line."""

    files: list[str] = field(default_factory=list)
    """Words that belong to no option."""
    options: list[tuple[str, str | list[str] | bool | None]] = field(default_factory=list)
    """Options without their dashes, in order, with their text; several words of a list; True for a
    bare switch, None where the text is missing."""


def split_words(
    argv: Sequence[str],
    is_switch: Callable[[str], bool],
    is_list: Callable[[str], bool],
    takes_yaml: Callable[[str], bool] = lambda name: False,
) -> Words:
    """Sort words into options with their text, and files.

    Args:
        argv: the words after the command.
        is_switch: whether an option may stand without text (true or false).
        is_list: whether an option takes all words up to the next option or the config file.
        takes_yaml: whether a list may hold paths of .yaml files; the config file then stands first.

    Returns:
        The words, sorted; nothing is judged here but what looks like an option.
    """
    words = Words()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_option(word):
            words.files.append(word)
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        if equals:
            words.options.append((name, text))
        elif is_switch(name):
            given = bool(rest) and _is_switch_text(rest[0])
            words.options.append((name, rest.pop(0) if given else True))
        elif is_list(name):
            several = []
            while rest and not _is_option(rest[0]):
                if _is_config_file(rest[0]) and not takes_yaml(name):
                    break
                several.append(rest.pop(0))
            words.options.append((name, several if len(several) > 1 else (several or [None])[0]))
        else:
            given = bool(rest) and not _is_option(rest[0])
            words.options.append((name, rest.pop(0) if given else None))
    return words


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NEGATIVE_NUMBER.fullmatch(word)


def _is_switch_text(word: str) -> bool:
    """Whether a word after a switch is its text rather than the config file."""
    return word.lower() in _BOOLEANS or not (_is_option(word) or _is_config_file(word))


def _is_config_file(word: str) -> bool:
    """Whether a word that could be an option's text is the config file, as it is for most."""
    return word.endswith((".yaml", ".yml"))
