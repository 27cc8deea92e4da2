"""Secrets are left out of everything that is written or said: passwords, tokens, keys."""

import os
import re
from typing import Any

HIDDEN = "REDACTED"
"""In place of a secret. A plain word, so that it is itself in YAML, JSON and Markdown."""

_NAMES = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|APIKEY|API_KEY|ACCESS_KEY)(?:_ID|_KEY)?$",
    re.IGNORECASE,
)
_SHORTEST = 8
"""Values of variables that are shorter may well be ordinary words."""
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
)
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_PART_OF_URL = re.compile(
    r"(?<=[?&])((?:access_|auth_|api_)?(?:token|key|secret|password|signature|sig))=[^&\s#]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """The text without what looks like a secret, or is one in this process's environment.

    Known forms of tokens, users and passwords of addresses (`https://user:token@host`), their
    parameters (`?token=...`), and the values of variables that are named like secrets.
    """
    return redacted_values(text)


def redacted_values(value: Any) -> Any:
    """The same for every text inside dicts and lists, keys included."""
    secrets = _secrets_of_environment()

    def without(held: Any) -> Any:
        match held:
            case str():
                return _without(held, secrets)
            case dict():
                return {without(key): without(part) for key, part in held.items()}
            case list() | tuple():
                return [without(part) for part in held]
            case _:
                return held

    return without(value)


def _without(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    text = _PART_OF_URL.sub(rf"\1={HIDDEN}", text)
    return _USER_OF_URL.sub(HIDDEN, text)


def _secrets_of_environment() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        # A path says where a secret lies, and is none.
        if _NAMES.search(name) and len(value) >= _SHORTEST and not value.startswith(("/", "."))
    }
    return sorted(found, key=len, reverse=True)
