"""Stream the elements of a JSON document that is one list, however long the list is."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_BLANK = re.compile(r"[ \t\n\r]*")
_NEAR = 16
"""More characters than any token but a string has: a cut token is not further from the end."""


class JsonListError(Exception):
    """The document is not valid JSON; `line` counts from 1."""

    def __init__(self, problem: str, line: int) -> None:
        """Keep what is wrong, in json's words, and where."""
        super().__init__(problem)
        self.line = line


class NotAListError(Exception):
    """The document is another value than a list; `value` shows its type."""

    def __init__(self, value: Any) -> None:
        """Keep the value, or an empty one of its type where it is long."""
        super().__init__()
        self.value = value


def json_list(file: TextIO, size: int = 1 << 17) -> Iterator[Any]:
    """Yield the elements one by one; nothing for a blank document.

    Errors are those of `json.loads` on the whole text, with the same places, raised when the
    reading gets there.

    Args:
        file: the text, opened without translation of line ends.
        size: characters read at a time; memory holds about two such blocks, or twice the longest
            element.

    Raises:
        JsonListError: not valid JSON.
        NotAListError: valid, as far as was read, and not a list.
    """
    window = _Window(file, size)
    first = window.peek()
    if first == "":
        return
    if first != "[":
        raise NotAListError(window.only_value(first))
    window.position += 1
    if window.peek() == "]":
        window.position += 1
    else:
        yield window.value()
        while window.after_value() == ",":
            window.peek()
            yield window.value()
    if window.peek():
        raise window.error("Extra data", window.position)


class _Window:
    """The part of the text that is being decoded, and where in the document it begins."""

    def __init__(self, file: TextIO, size: int) -> None:
        self.file, self.size = file, size
        self.text, self.position = "", 0
        self.ended = False
        # Of the text before the window: its characters, its lines, and the characters of its last
        # line.
        self.chars, self.lines, self.columns = 0, 0, 0
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> None:
        """Forget what was decoded and read on.

        An element longer than the window doubles it each time, so that decoding it again and again
        stays linear in its length.
        """
        newline = self.text.rfind("\n", 0, self.position)
        self.columns = self.position - newline - 1 + (self.columns if newline < 0 else 0)
        self.lines += self.text.count("\n", 0, self.position)
        self.chars += self.position
        self.text, self.position = self.text[self.position :], 0
        block = self.file.read(max(self.size, len(self.text)))
        self.text += block
        self.ended = not block

    def peek(self) -> str:
        """Skip blanks; the character there, or nothing at the end."""
        while True:
            blank = _BLANK.match(self.text, self.position)
            assert blank is not None  # it matches nothing at all, too
            self.position = blank.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.more()

    def value(self) -> Any:
        """Decode the value that begins here."""
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - _NEAR or error.msg.startswith("Unterminated")
                if self.ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                # A number of thousands of digits; lists in lists in lists.
                raise JsonListError(str(error), self._line(self.position)) from None
            else:
                # A number near the end of the window may go on: of 1.5, `1.` reads as 1 and a dot.
                if end <= len(self.text) - _NEAR or self.ended:
                    self.position = end
                    return value
            self.more()

    def after_value(self) -> str:
        """Pass the comma or bracket after an element."""
        mark = self.peek()
        if mark not in (",", "]"):
            raise self.error("Expecting ',' delimiter", self.position)
        self.position += 1
        return mark

    def only_value(self, first: str) -> Any:
        """What the document is, which begins with another character than `[`.

        A long object is not read to its end, only to say that it is not a list.
        """
        if first == "{" and len(self.text) >= self.size:
            return {}
        value = self.value()
        if self.peek():
            raise self.error("Extra data", self.position)
        return value

    def error(self, problem: str, position: int) -> JsonListError:
        """Make the error with its place in the document, in json's words."""
        newline = self.text.rfind("\n", 0, position)
        column = position - newline + (self.columns if newline < 0 else 0)
        line = self._line(position)
        place = f"line {line} column {column} (char {self.chars + position})"
        return JsonListError(f"{problem}: {place}", line)

    def _line(self, position: int) -> int:
        return self.lines + self.text.count("\n", 0, position) + 1
