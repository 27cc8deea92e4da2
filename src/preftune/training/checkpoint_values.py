"""What the JSON part of a checkpoint may hold; anything else was not written by a run."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_MOST = 2**62
_WORD = 2**32


def check_values(document: Mapping[str, Any]) -> None:
    """Refuse values that restoring would stumble over, or take for something else.

    Raises:
        ValueError: with the first key that is wrong.
    """
    for key, is_right in _RULES.items():
        if key not in document:
            raise ValueError(f"{key} is missing")
        if not is_right(document[key]):
            raise ValueError(f"{key} holds what no run writes there")


def _is_count(value: Any, below: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (isinstance(value, float) or abs(value) < _MOST)


def _is_running(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(map(_is_number, value))


def _is_window(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(sums, list) and len(sums) == 2 and all(map(_is_number, sums))
        for sums in value.values()
    )


def _are_words(value: Any, number: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == number
        and all(_is_count(word, _WORD) for word in value)
    )


def _is_python_rng(value: Any) -> bool:
    """Version 3 of Python's generator: 624 words, the position among them, a spare normal."""
    if not (isinstance(value, list) and len(value) == 3 and value[0] == 3):
        return False
    return _are_words(value[1], 625) and value[1][-1] <= 624 and _is_spare(value[2])


def _is_numpy_rng(value: Any) -> bool:
    """NumPy's MT19937: its name, 624 words, the position, whether there is a spare normal, it."""
    if not (isinstance(value, list) and len(value) == 5 and value[0] == "MT19937"):
        return False
    return (
        _are_words(value[1], 624)
        and _is_count(value[2], 625)
        and _is_count(value[3], 2)
        and _is_spare(value[4])
    )


def _is_spare(value: Any) -> bool:
    return value is None or (_is_number(value) and math.isfinite(value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "num_tokens": _is_count,
    "metrics_offset": _is_count,
    "running": _is_running,
    "window": _is_window,
    "guards": _is_object,
    "python_rng": _is_python_rng,
    "numpy_rng": _is_numpy_rng,
    "config": _is_object,
    "identity": _is_object,
}
