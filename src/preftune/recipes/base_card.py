"""What a base model's own card says of it, as far as the card is on this machine."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from preftune.config.model import ModelConfig

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
_LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseCard:
    """Of a base model; what is not known is not there."""

    licence: dict[str, str]
    """`license` and what belongs to it, as the hub's metadata have it."""
    base_model: str | None
    """On a hub: the model itself, or what a local one says that it was made from."""


def is_on_hub(name: str) -> bool:
    """Whether a model or data set is named by its name on a hub, and not by a local path."""
    if name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return False
    return not Path(name).exists()


def read_base_card(name: str, revision: str | None) -> BaseCard:
    """Read the metadata of a base model's card; asks no hub.

    Args:
        name: a folder, or a name on a hub.
        revision: of it, on a hub.
    """
    if is_on_hub(name):
        found = try_to_load_from_cache(name, "README.md", revision=revision)
        path = Path(found) if isinstance(found, str) else None
    else:
        folder = Path(name).expanduser()
        path = (folder if folder.is_dir() else folder.parent) / "README.md"
    front = {} if path is None else _front_matter(path)
    licence = {key: held for key in _LICENCE if isinstance(held := front.get(key), str)}
    if "license" not in licence:
        licence = {}
    base = name if is_on_hub(name) else front.get("base_model")
    if isinstance(base, list) and len(base) == 1:
        base = base[0]
    return BaseCard(licence, base if isinstance(base, str) else None)


def fetch_base_card(config: ModelConfig) -> None:
    """Have the card of a model of a hub here, so that its licence is known; without it if need be.

    Args:
        config: names the model.
    """
    name = str(config.model_name_or_path)
    if is_on_hub(name):
        # Many models have none, and no training fails for want of it.
        with suppress(Exception):
            hf_hub_download(name, "README.md", revision=config.model_revision)


def _front_matter(path: Path) -> dict[str, Any]:
    try:
        found = _FRONT.match(path.read_text("utf-8"))
        front = yaml.safe_load(found.group(1)) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return front if isinstance(front, dict) else {}
