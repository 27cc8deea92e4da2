"""A judge that is a Python function of the user's."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from preftune.data.transforms import import_function
from preftune.errors import ConfigError
from preftune.evaluation.judging.judge import as_text
from preftune.evaluation.win_rate import Verdict
from preftune.schema import Message

_MEANT: dict[str, Verdict] = {"a": "first", "b": "second", "tie": "tie"}


@dataclass(frozen=True)
class FunctionJudge:
    """Calls `function(prompt, answer_a, answer_b)`."""

    name: str
    function: Callable[[str, str, str], Any]
    parallel: int = 1

    @classmethod
    def named(cls, name: str) -> "FunctionJudge":
        """Import it.

        Args:
            name: module:function; modules of the current folder can be named.

        Raises:
            ConfigError: it does not exist, or cannot be imported or called.
        """
        what = "a function of prompt and two answers"
        return cls(name, import_function(name, f"judge_function: {name!r}", what))

    def compare(self, prompt: list[Message], first: str, second: str) -> Verdict:
        """What the function says; None where that is no verdict, such as another word or NaN."""
        try:
            said = self.function(as_text(prompt), first, second)
        except Exception as error:
            raise ConfigError(
                f"judge_function {self.name!r} raised {type(error).__name__}: {error}; correct it"
            ) from error
        if isinstance(said, str):
            return _MEANT.get(said.strip().lower())
        try:
            number = float(said)
        except (TypeError, ValueError):
            return None
        if math.isnan(number):
            return None
        return "tie" if number == 0 else "first" if number > 0 else "second"
