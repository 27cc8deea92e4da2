"""Lengths of time as people and Slurm write them."""

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_PART = r"([0-9]+(?:\.[0-9]+)?)\s*([dhms])"
_WORDS = re.compile(rf"(?:{_PART}\s*)+")
_CLOCK = re.compile(r"(?:([0-9]+):)?([0-9]+):([0-9]{2})")
_DAYS = re.compile(r"([0-9]+)-([0-9]+)(?::([0-9]{2}))?(?::([0-9]{2}))?")


def seconds_of(text: str | int) -> float:
    """A length of time in seconds.

    Args:
        text: 3600, 90m, 1h30m, 12:00:00 (hours, minutes, seconds), 90:00 (minutes, seconds), or
            days-hours, with minutes and seconds if need be: 1-12:00:00.

    Raises:
        ValueError: it is none of these; says what it may be.

    Example:
        >>> [seconds_of(text) for text in (3600, "90m", "1h30m", "12:00:00", "1-12")]
        [3600.0, 5400.0, 5400.0, 43200.0, 129600.0]
    """
    text = str(text).strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    if _WORDS.fullmatch(text):
        return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text))
    if match := _CLOCK.fullmatch(text):
        hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return 3600.0 * hours + 60 * minutes + seconds
    if match := _DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return 86400.0 * days + 3600 * hours + 60 * minutes + seconds
    raise ValueError(
        "it must be a length of time such as 90m, 2h, 1h30m, 12:00:00, 1-12:00:00, or a number of "
        "seconds"
    )
