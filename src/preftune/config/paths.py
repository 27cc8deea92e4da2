"""Where preftune keeps what several runs share."""

import os
from pathlib import Path


def cache_root(cache_dir: str | None) -> Path:
    """The cache folder: the option, else `$PREFTUNE_CACHE`, else `~/.cache/preftune`."""
    chosen = cache_dir or os.environ.get("PREFTUNE_CACHE") or "~/.cache/preftune"
    return Path(chosen).expanduser()
