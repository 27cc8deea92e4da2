"""Prompts that a judge compares answers to: of a file, or the held-out ones of a run."""

from collections.abc import Iterable
from typing import Any

from preftune.config.experiment import ExperimentConfig
from preftune.data.pairs import PairDataset
from preftune.data.sources import open_source
from preftune.data.tokenized import Recipe
from preftune.data.transforms import load_transforms
from preftune.errors import ConfigError, DataError
from preftune.evaluation.judging.kept import digest
from preftune.recipes.pairs import prepare_tokenizer, read_experiment_pairs
from preftune.schema import Example, Message
from preftune.tracking.progress import ProgressDisplay


def prompts_of_file(name: str) -> list[list[Message]]:
    """The prompts in column prompt, each once.

    Args:
        name: the file.

    Raises:
        DataError: a row has no prompt.
    """
    rows = open_source(name, "test").rows()
    return _distinct(_messages(row_id, row.get("prompt")) for row_id, row in rows)


def _messages(row_id: str, prompt: Any) -> list[Message]:
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    turns = [_turn(turn) for turn in prompt] if isinstance(prompt, list) else []
    messages = [turn for turn in turns if turn is not None]
    if messages and len(messages) == len(turns) and messages[-1]["role"] == "user":
        return messages
    raise DataError(
        f"{row_id} of judge_prompts: prompt is {prompt!r:.80}; it must be text, or messages of "
        "role and content that end with the user's"
    )


def _turn(turn: Any) -> Message | None:
    if not isinstance(turn, dict):
        return None
    held = {key: turn.get(key) for key in ("role", "content")}
    return held if all(isinstance(value, str) for value in held.values()) else None


def prompts_of_run(
    config: ExperimentConfig | None, display: ProgressDisplay
) -> list[list[Message]]:
    """The held-out prompts of a run, each once.

    Args:
        config: of the run; None where a model is evaluated that is no run.
        display: says what is left out.

    Raises:
        ConfigError: there is no run, or it held nothing out.
        DataError: no prompt is messages.
    """
    if config is None or not config.has_eval_data:
        what = "the run held no pairs out" if config is not None else "there is no run"
        raise ConfigError(f"judge_prompts is not set, and {what}; give a file of prompts")
    pairs = read_experiment_pairs(config, prepare_tokenizer(config), ProgressDisplay("none"))
    recipe = Recipe(
        prepare_tokenizer(config),
        dict(config.column_map or {}),
        load_transforms(config.dataset_transforms or ()),
        config.row_kind,
    )
    examples = [row for data in pairs.held_out.values() for row in _read_again(data, recipe)]
    found = _distinct(
        row.prompt for row in examples if not isinstance(row.prompt, str) and not row.tools
    )
    others = sum(isinstance(row.prompt, str) or bool(row.tools) for row in examples)
    if others:
        display.say(f"judge: {others} held-out rows of plain text or with tools are left out")
    if not found:
        raise DataError("the run's held-out rows are plain text; give messages as --judge_prompts")
    return found


def _read_again(dataset: PairDataset, recipe: Recipe) -> Iterable[Example]:
    wanted = {dataset.examples.row_id(index) for index in range(len(dataset.examples))}
    for source in dataset.opened:
        for row_id, raw in source.rows():
            for row in recipe.parse(row_id, raw, source.name):
                if isinstance(row, Example) and row.row_id in wanted:
                    yield row


def _distinct(prompts: Iterable[Any]) -> list[list[Message]]:
    return list({digest(prompt): prompt for prompt in prompts}.values())
