"""One raw row: its columns under our names, and checks of their types."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from preftune.config.dataset import COLUMNS
from preftune.errors import DataError
from preftune.schema import Example, Message, Role, Text

_LARGEST = sys.float_info.max


def check_column_map(column_map: Mapping[str, str]) -> None:
    """Refuse a map that names columns which would not be read.

    Raises:
        DataError: a key is not one of `COLUMNS`.
    """
    for key in column_map:
        if key not in COLUMNS:
            near = difflib.get_close_matches(key, COLUMNS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(
                f"column_map: {key!r} is not a column preftune reads{hint}; the keys are "
                f"{', '.join(COLUMNS)}, and the values what your data calls them"
            )


@dataclass(frozen=True, slots=True)
class Row:
    """A raw row with its id; `column_map` says what the file calls our columns."""

    row_id: str
    dataset: str
    values: Mapping[str, Any]
    column_map: Mapping[str, str]

    def has(self, name: str) -> bool:
        """Whether the row has a value there; a column of nulls counts as absent.

        Raises:
            DataError: `column_map` names a column that the row lacks.
        """
        column = self._column(name)
        if name in self.column_map and column not in self.values:
            raise self.error(
                f"column_map says that {name!r} is called {column!r}, which this row lacks",
                "correct the name in column_map, or add the column to every row",
            )
        return self.values.get(column) is not None

    def text(self, name: str) -> Text:
        """Read a column that holds text or messages.

        Raises:
            DataError: absent, null, of another type, or messages without a role or content.
        """
        value = self._given(name)
        if isinstance(value, str):
            return self._encodable(name, value)
        if isinstance(value, list):
            return [self._message(name, i, message) for i, message in enumerate(value)]
        raise self.error(
            f"column {self._column(name)!r} is {_kind(value)} ({_short(value)})",
            "write text, or a list of messages with 'role' and 'content'",
        )

    def source(self) -> str:
        """Read the row's source, which is the dataset's name where the column is absent.

        Raises:
            DataError: the column is not text.
        """
        if not self.has("source"):
            return self.dataset
        value = self.values[self._column("source")]
        if not isinstance(value, str):
            raise self.error(
                f"column {self._column('source')!r} is {_kind(value)} ({_short(value)})",
                "write the source's name as text, or map 'source' to another column",
            )
        return value

    def tools(self) -> list[dict[str, Any]] | None:
        """Read the tool schemas, given as a list or as a JSON string of one.

        Raises:
            DataError: not a list of objects.
        """
        if not self.has("tools"):
            return None
        value = self.values[self._column("tools")]
        if isinstance(value, str):
            if not value.strip():
                return None
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise self.error(
                    f"column {self._column('tools')!r} is text that is not valid JSON ({error})",
                    "write a JSON list of tool schemas, or leave the column empty",
                ) from None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(
                f"column {self._column('tools')!r} is {_kind(value)} ({_short(value)})",
                "write a list of tool schemas (JSON objects), or leave the column empty",
            )
        return value or None

    def label(self) -> bool:
        """Read whether an answer is one to learn.

        Raises:
            DataError: absent, null, or neither a boolean nor 0 or 1.
        """
        value = self._given("label")
        if isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        raise self.error(
            f"column {self._column('label')!r} is {_kind(value)} ({_short(value)})",
            "write true for an answer to be learnt and false for one to be avoided, without "
            "quotes (a .csv file holds only text: use .jsonl or .parquet)",
        )

    def example(
        self,
        prompt: Text,
        completions: tuple[Text, ...],
        roles: tuple[Role, ...],
        tools: list[dict[str, Any]] | None = None,
    ) -> Example:
        """The row as an example, with its source, weight and margin.

        Raises:
            DataError: source, weight or margin is of the wrong type.
        """
        weight = self._number("weight", 0.0, "of 0 or more (a row of weight 0 trains nothing)")
        return Example(
            row_id=self.row_id,
            prompt=prompt,
            completions=completions,
            roles=roles,
            source=self.source(),
            tools=tools,
            weight=1.0 if weight is None else weight,
            margin=self._number("margin", -_LARGEST, "in units of reward"),
        )

    def error(self, problem: str, remedy: str) -> DataError:
        """Make the error for this row: where, what, the columns that exist, what to do."""
        columns = ", ".join(str(c) for c in self.values) or "none"
        return DataError(
            f"{self.row_id} of dataset {self.dataset}: {problem} (columns: {columns}); {remedy}"
        )

    def _number(self, name: str, least: float, what: str) -> float | None:
        """Read a finite number of at least `least`; None where it is absent or null."""
        if not self.has(name):
            return None
        value = self.values[self._column(name)]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and least <= value <= _LARGEST:  # false for nan
            return float(value)
        raise self.error(
            f"column {self._column(name)!r} is {_kind(value)} ({_short(value)})",
            f"write a finite number {what}, without quotes, or leave the column out (a .csv file "
            "holds only text: use .jsonl or .parquet)",
        )

    def _given(self, name: str) -> Any:
        """The value of a column that must have one.

        Raises:
            DataError: absent or null.
        """
        column = self._column(name)
        if self.has(name):
            return self.values[column]
        state = "is null" if column in self.values else "is missing"
        raise self.error(
            f"column {column!r} {state}", _rename_hint(name, column not in self.values)
        )

    def _column(self, name: str) -> str:
        return self.column_map.get(name, name)

    def _message(self, name: str, index: int, message: Any) -> Message:
        where = f"message {index} of column {self._column(name)!r}"
        if not isinstance(message, dict):
            raise self.error(
                f"{where} is {_kind(message)} ({_short(message)})",
                "write each message as an object with 'role' and 'content'",
            )
        # Arrow fills keys that only other rows have with nulls; templates test for presence.
        kept = {key: value for key, value in message.items() if value is not None}
        if not isinstance(kept.get("role"), str) or not kept["role"]:
            raise self.error(
                f"{where} has no role (role: {_kind(kept.get('role'))}; keys: "
                f"{', '.join(str(k) for k in message)})",
                "give each message a 'role' (system, user, assistant, …) and 'content'",
            )
        content = kept.get("content")
        if content is None and kept.get("tool_calls"):
            return kept  # a call of a tool need not say anything
        if not isinstance(content, str):
            raise self.error(
                f"the content of {where} is {_kind(content)} ({_short(content)})",
                "write each message's content as text",
            )
        self._encodable(name, content)
        return kept

    def _encodable(self, name: str, value: str) -> str:
        # JSON may spell half a surrogate pair; the tokenizer would stop on it, naming no row.
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.error(
                f"column {self._column(name)!r} holds text that is not valid Unicode "
                f"({value[error.start : error.end]!r} at character {error.start})",
                "write the character whole (a surrogate pair) or remove it",
            ) from None
        return value


def renamed(
    row_id: str, raw: Mapping[str, Any], dataset: str, column_map: Mapping[str, str]
) -> dict[str, Any]:
    """A row with its columns under our names, as transforms see it.

    Raises:
        DataError: `column_map` names a column that the row lacks.
    """
    row = Row(row_id=row_id, dataset=dataset, values=raw, column_map=column_map)
    mapped = {name: raw[theirs] for name, theirs in column_map.items() if row.has(name)}
    taken = set(column_map.values())
    return {name: value for name, value in raw.items() if name not in taken} | mapped


def _rename_hint(name: str, missing: bool) -> str:
    if not missing:
        return "fill it in, or remove the row"
    return f'add it, or say what your data calls it: --column_map \'{{"{name}": "your_name"}}\''


def _kind(value: Any) -> str:
    """Name a value's type as JSON users know it."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return f"of type {type(value).__name__}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
