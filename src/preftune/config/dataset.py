"""Which pairs, and how they become tokens."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section
from preftune.config.typed import number

Truncation = Literal["drop", "keep_start", "keep_end"]
COLUMNS = (
    "messages",
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "weight",
    "margin",
    "tools",
    "source",
)
"""Columns of a row that `column_map` can rename."""
_LABEL = re.compile(r"[\w.-]+")
_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_MODULE_FUNCTION = re.compile(f"{_DOTTED}:{_DOTTED}")
_SOURCES = ("dataset_name", "dataset_mixer", "dataset_mixer_list")


@dataclass(kw_only=True)
class PairsConfig(Section):
    """Reading pairs: training and scoring need the same."""

    dataset_name: str | None = None
    """The pairs: a .jsonl, .json, .parquet or .csv file, a folder, or a dataset's name on the
    Hugging Face Hub. Required."""

    dataset_split: str = "train"
    """The split to read, where the dataset has several."""

    column_map: dict[str, str] | None = None
    """Columns under other names, as {prompt: question, chosen: good, rejected: bad}. Unset: the
    columns are called prompt (optional), chosen and rejected; in rows of one answer prompt,
    completion and label (true or false); with `stage` sft messages, or prompt and completion;
    besides these weight (of the row's loss, 0 or more),
    margin (how much better the chosen answer is, in units of reward), tools and source."""

    max_length: int | None = 2048
    """Most tokens of prompt and completion together, 2 or more; null is no limit. `truncation`
    says what happens to longer ones."""

    max_prompt_length: int | None = None
    """Most tokens of a prompt, 1 to `max_length`. Unset: only `max_length` holds."""

    truncation: Truncation = "drop"
    """What happens to a pair over length. drop: left out and counted; keep_start: its end is
    cut; keep_end: the start of its prompt is cut."""

    max_dropped_fraction: float = 0.01
    """Stop with an error if more than this part of the rows cannot be trained on, 0 to 1 (off)."""

    dataset_transforms: list[str] | None = None
    """Row functions to apply to every row, in this order, before anything is checked: names, or
    module:function of your own. Unset: none."""

    num_proc: int | None = None
    """Processes that tokenise, 1 or more. Unset: 1."""

    cache_dir: str | None = None
    """Folder of tokenised data and reference log-probs. Unset: $PREFTUNE_CACHE, or
    ~/.cache/preftune."""

    dataset_cache_mode: Literal["local", "hub", "off"] = "local"
    """Where tokenised data is kept for the next run. local: in `cache_dir`; hub: in a dataset
    repository on the Hub, too; off: nowhere."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        if self.dataset_name is None:
            message = "it must name a file, a folder or a dataset on the Hugging Face Hub"
            found.append(Problem("dataset_name", None, message))
        return found + _pairs_problems(self)


@dataclass(kw_only=True)
class DatasetConfig(PairsConfig):
    """The pairs to train on, and those to evaluate on."""

    dataset_name: str | None = None
    """The pairs: a .jsonl, .json, .parquet or .csv file, a folder, or a dataset's name on the
    Hugging Face Hub. Exactly one of this, `dataset_mixer` and `dataset_mixer_list` is required."""

    dataset_mixer: dict[str, int | float] | None = None
    """Pairs of several sources: name to amount. An amount with a decimal point is a part of the
    rows, above 0 (1.0: all; above 1 repeats rows); a whole number is a number of rows, 1 or more
    (1: one row). Unset: `dataset_name` alone."""

    dataset_mixer_list: list[str | int | float] | None = None
    """`dataset_mixer` as a list of name, amount, name, amount. Unset: `dataset_name` alone."""

    eval_dataset: str | dict[str, str] | None = None
    """Pairs for evaluation: a file, a folder or a name on the Hub; or several, as a map of label
    to name, whose metrics are called eval/<label>/... Unset: none, unless `test_size` is given."""

    eval_split: str | None = None
    """The split of `eval_dataset` to read, where it has several. Unset: test."""

    test_size: int | float | None = None
    """Hold out pairs of the training data for evaluation, by prompt: a part of the rows (between
    0 and 1) or a number of rows (1 or more). Unset: none."""

    max_train_samples: int | None = None
    """Read only the first this many rows of the training data, before `test_size` holds any out;
    1 or more. Unset: all."""

    cache_dataset_only: bool = False
    """Tokenise, fill the cache and stop: a preparation job. Not with `dataset_cache_mode` off."""

    def __post_init__(self) -> None:
        """Write the amounts of a list as text, as they come from a file or the command line."""
        if isinstance(self.dataset_mixer_list, list):
            self.dataset_mixer_list = [str(item) for item in self.dataset_mixer_list]

    @property
    def sources(self) -> tuple[tuple[str, int | float | None], ...]:
        """What to train on: names with their amounts (None: all rows), in the order given."""
        if self.dataset_mixer is not None:
            return tuple(self.dataset_mixer.items())
        if self.dataset_mixer_list is not None:
            words = [str(item) for item in self.dataset_mixer_list]
            return tuple(
                (name, number(amount)) for name, amount in zip(words[::2], words[1::2], strict=True)
            )
        assert self.dataset_name is not None  # problems() refuses a config without any source
        return ((self.dataset_name, None),)

    @property
    def eval_sources(self) -> dict[str, str]:
        """What to evaluate on: label to name; the label of a single one is empty."""
        if isinstance(self.eval_dataset, str):
            return {"": self.eval_dataset}
        return dict(self.eval_dataset or {})

    @property
    def has_eval_data(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.eval_dataset is not None or self.test_size is not None

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = _source_problems(self) + _pairs_problems(self) + _eval_problems(self)
        if self.cache_dataset_only and self.dataset_cache_mode == "off":
            message = "dataset_cache_mode is off, so there is no cache to fill: leave one out"
            found.append(Problem("cache_dataset_only", True, message, ("dataset_cache_mode",)))
        return found + count("max_train_samples", self.max_train_samples)


def _source_problems(section: DatasetConfig) -> list[Problem]:
    given = [key for key in _SOURCES if getattr(section, key) is not None]
    if not given:
        message = (
            "it must name a file, a folder or a dataset on the Hugging Face Hub; or give "
            "dataset_mixer or dataset_mixer_list"
        )
        return [Problem("dataset_name", None, message, _SOURCES)]
    found = []
    if len(given) > 1:
        first, *more = given
        message = f"{' and '.join(more)} is given too, and they exclude each other: keep one"
        found.append(Problem(first, getattr(section, first), message, tuple(more)))
    if section.dataset_mixer is not None:
        found += _amount_problems("dataset_mixer", section.dataset_mixer, section.dataset_mixer)
    if section.dataset_mixer_list is not None:
        found += _list_problems(section.dataset_mixer_list)
    return found


def _list_problems(held: list[str | int | float]) -> list[Problem]:
    key = "dataset_mixer_list"
    words = [str(item) for item in held]
    if len(words) % 2:
        message = f"it must alternate name and amount, and {words[-1]!r} has no amount"
        return [Problem(key, held, message)]
    names, amounts = words[::2], {}
    for name, amount in zip(names, words[1::2], strict=True):
        if names.count(name) > 1:
            return [Problem(key, held, f"{name!r} is named twice; keep one")]
        try:
            amounts[name] = number(amount)
        except ValueError:
            message = f"the amount of {name!r} is {amount!r}; it must be a finite number"
            return [Problem(key, held, message)]
    return _amount_problems(key, held, amounts)


def _amount_problems(key: str, held: object, amounts: dict[str, int | float]) -> list[Problem]:
    if not amounts:
        return [Problem(key, held, "it must name at least one source")]
    return [
        Problem(
            key,
            held,
            f"the amount of {name!r} is {amount!r}; it must be a part of the rows (above 0, with a "
            "decimal point) or a number of rows (1 or more)",
        )
        for name, amount in amounts.items()
        if amount <= 0
    ]


def _eval_problems(section: DatasetConfig) -> list[Problem]:
    found = []
    size, names = section.test_size, section.eval_dataset
    in_range = 0 < size < 1 if isinstance(size, float) else size is None or size >= 1
    if not in_range:
        message = "it must be a part between 0 and 1, or a number of rows (1 or more)"
        found.append(Problem("test_size", size, message))
    if names == {}:
        message = "it must name at least one dataset; for none, leave it out"
        found.append(Problem("eval_dataset", names, message))
    for label in names if isinstance(names, dict) else ():
        if not _LABEL.fullmatch(label):
            message = f"{label!r} becomes part of metric names; use letters, digits, _ . and -"
            found.append(Problem("eval_dataset", names, message))
    if names is not None and size is not None:
        message = "eval_dataset is given too, and they exclude each other: leave one out"
        found.append(Problem("test_size", size, message, ("eval_dataset",)))
    if section.eval_split is not None and names is None:
        message = "there is no eval_dataset to read it from: leave it out"
        found.append(Problem("eval_split", section.eval_split, message, ("eval_dataset",)))
    return found


def _pairs_problems(section: PairsConfig) -> list[Problem]:
    found = count("num_proc", section.num_proc)
    for column in section.column_map or {}:
        if column not in COLUMNS:
            message = f"{column!r} is not a column that is read; they are {', '.join(COLUMNS)}"
            found.append(Problem("column_map", section.column_map, message))
    if not 0 <= section.max_dropped_fraction <= 1:
        message = "it must be from 0 to 1"
        found.append(Problem("max_dropped_fraction", section.max_dropped_fraction, message))
    transforms = section.dataset_transforms
    if transforms == []:
        message = "it must name at least one row function; for none, leave it out"
        found.append(Problem("dataset_transforms", transforms, message))
    for name in transforms or ():
        if ":" in name and not _MODULE_FUNCTION.fullmatch(name):
            message = f"{name!r} must be module:function, such as my_package.rows:shorten"
            found.append(Problem("dataset_transforms", transforms, message))
    return found + _length_problems(section)


def _length_problems(section: PairsConfig) -> list[Problem]:
    found = count("max_length", section.max_length, least=2)
    found += count("max_prompt_length", section.max_prompt_length)
    if section.max_length is None and section.max_prompt_length is None:
        if section.truncation != "drop":
            message = "it cuts nothing without max_length or max_prompt_length: leave it out"
            others = ("max_length", "max_prompt_length")
            found.append(Problem("truncation", section.truncation, message, others))
    elif (section.max_prompt_length or 0) > (section.max_length or math.inf):
        message = f"it must not be above max_length ({section.max_length})"
        key, value = "max_prompt_length", section.max_prompt_length
        found.append(Problem(key, value, message, ("max_length",)))
    return found
