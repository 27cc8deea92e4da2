"""Presets: settings that papers and model cards publish, to start from."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from preftune.config.problem import listed
from preftune.config.yamlfile import Entry, read_yaml
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import DPOLossType

PRESET_KEY = "preset"
"""Key of a config file, and option, that names a preset; it is no field of a configuration."""
PRESET_DOC = "Settings to start from, which the file and the command line change. Unset: defaults."
_FOLDER = Path(__file__).parent / "presets"

_SOURCES = ("dataset_name", "dataset_mixer", "dataset_mixer_list")
# Settings that exclude each other: a user's value puts the preset's other one out.
_ALTERNATIVES = (
    _SOURCES,
    ("num_epochs", "max_train_steps"),
    ("warmup_ratio", "warmup_steps"),
    ("eval_strategy", "eval_steps"),
    ("eval_dataset", "test_size"),
    ("forward_layout", "concatenated_forward"),
)
# What only describes the preset's own value: it goes where a user's value replaces that.
_ATTRIBUTES = {
    **dict.fromkeys(_SOURCES, ("dataset_split", "column_map", "dataset_transforms")),
    "model_name_or_path": (
        "model_revision",
        "tokenizer_name_or_path",
        "tokenizer_revision",
        "chat_template",
    ),
}


def preset_names() -> list[str]:
    """The names of all presets, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset.

    Args:
        name: the preset.

    Raises:
        ValueError: there is none of this name; the text says which there are, to follow
            "NAME is x; ".
    """
    names = preset_names()
    if name not in names:
        near = [known for known in names if name and known.startswith(name)]
        near = near or get_close_matches(name, names, n=1)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ValueError(f"it must be {listed(names)}{hint}")
    return _FOLDER / f"{name}.yaml"


def preset_summary(name: str) -> str:
    """What a preset is, in one line: the first of its file."""
    first, _, _ = preset_path(name).read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("# ")


def preset_entries(name: str, given: Mapping[str, Any]) -> list[Entry]:
    """The settings of a preset that stay beside what the user gave.

    Args:
        name: the preset.
        given: the user's values; one of null puts out nothing but the preset's own.

    Raises:
        ValueError: there is no preset of this name.
    """
    entries = read_yaml(str(preset_path(name)))
    out = _put_out({key for key, value in given.items() if value is not None})
    own_loss = next((e.value for e in entries if e.key == "loss_type"), DPOLossType.DPO)
    if given.get("loss_type") not in (None, own_loss):
        out |= KNOBS.keys()
    if given.get("lr_scheduler_type") == "constant":
        out |= {"warmup_ratio", "warmup_steps"}
    return [entry for entry in entries if entry.key not in out | given.keys()]


def _put_out(keys: set[str]) -> set[str]:
    out = {other for group in _ALTERNATIVES if keys & set(group) for other in group}
    return out.union(*(others for key, others in _ATTRIBUTES.items() if key in keys))
