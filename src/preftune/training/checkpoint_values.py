"""What the JSON part of a checkpoint may hold; anything else was not written by a run."""

from collections.abc import Callable, Mapping
from typing import Any

_MOST = 2**62


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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


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


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_RULES: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "num_tokens": _is_count,
    "metrics_offset": _is_count,
    "running": _is_running,
    "window": _is_window,
    "guards": _is_object,
    "config": _is_object,
    "identity": _is_object,
    "spread": _is_object,
}
