"""`preftune score`: log-probs, implicit rewards and accuracy of models on pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.micro_batches import RowSizes
from preftune.config.paths import cache_root
from preftune.config.score import ScoreConfig
from preftune.data.pairs import PairDataset
from preftune.data.table import TokenRows
from preftune.distributed.folders import look_at_folder
from preftune.distributed.runtime import AUTOCAST, Runtime, resolve_precision
from preftune.evaluation.generation import generating
from preftune.evaluation.lists import SortedPairs, rewards_without_reference, sort_pairs
from preftune.evaluation.samples import sampled_answers
from preftune.evaluation.score_tables import lists_text, summary_text
from preftune.evaluation.scores import (
    Comparison,
    PairScores,
    ScoreSummary,
    equally_long,
    summarise,
    summarise_sources,
    with_divergences,
)
from preftune.recipes.answer_logps import answer_logps, score_examples
from preftune.recipes.pairs import check_fits_model, load_dataset_pairs, model_context
from preftune.recipes.preflight import slow_settings
from preftune.recipes.same_start import agree_on_data, agree_on_start
from preftune.recipes.score_files import (
    check_outputs,
    listed_rows,
    write_lists,
    write_scores,
    write_summary,
)
from preftune.recipes.score_models import OpenModel, ScoredModel, look_at_models, opened
from preftune.schema import TokenizedExample
from preftune.tracking.progress import ProgressDisplay
from preftune.training.memory import explain_lack_of_memory


@dataclass(frozen=True)
class ScoreResult:
    """What a call of `score` found."""

    summary: ScoreSummary
    listed: tuple[dict[str, Any], ...]
    """The pairs of the lists, as their file has them; empty where none are asked for."""
    files: tuple[str, ...]
    """What was written."""

    def __str__(self) -> str:
        """What the command prints."""
        parts = [summary_text(self.summary)]
        if self.summary.lists is not None:
            parts.append(lists_text(self.summary.lists, self.listed))
        if self.files:
            parts.append("\n".join(f"written: {name}" for name in self.files))
        return "\n\n".join(parts)


def score(config: ScoreConfig) -> ScoreResult:
    """Score pairs under models and, where given, references.

    Models are loaded one after the other, so memory holds one at a time. Several ranks share the
    forwards.

    Args:
        config: models, pairs, references.

    Returns:
        The means, on every rank; files are written by rank 0.
    """
    runtime = Runtime(resolve_precision(config.mixed_precision), seed=0)
    agree_on_start(config, runtime)
    runtime.decide(lambda: check_outputs(config))
    models, tokenizer = runtime.together(lambda: look_at_models(config))
    display = ProgressDisplay(config.progress, is_main=runtime.is_main)
    for sentence in slow_settings(config, config.mixed_precision):
        display.say(sentence)
    cache = look_at_folder(runtime, "cache_dir", cache_root(config.cache_dir))
    dataset = runtime.leaders_first(
        lambda: _load(config, models, tokenizer, display), is_leader=cache.leads(runtime.rank)
    )
    agree_on_data({"to score": dataset}, runtime)
    examples = dataset.examples
    measured = _Measured()
    for model in models:
        _measure(model, examples, tokenizer, measured, config, runtime, display)
    rewards = _rewards(measured, config)
    found, margins = _sort(examples, measured, rewards, config)
    summary = _summarise(examples, measured, rewards, found, config)
    listed = [] if found is None else _listed(examples, tokenizer, found, margins, config)
    runtime.decide(lambda: _write(config, examples, measured, rewards, summary, listed))
    files = tuple(name for name in (config.output, config.summary, config.lists) if name)
    return ScoreResult(summary, tuple(listed), files)


def _load(
    config: ScoreConfig,
    models: Sequence[ScoredModel],
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
) -> PairDataset:
    """The pairs, which all models can take."""
    assert config.dataset_name is not None  # the config refuses an unset dataset
    configs = [model.config for model in models]
    contexts = [context for c in configs if (context := model_context(c)) is not None]
    dataset = load_dataset_pairs(
        config,
        tokenizer,
        display,
        [(config.dataset_name, None)],
        config.dataset_split,
        context=min(contexts, default=None),
    )
    for model_config in configs:
        check_fits_model(model_config, dataset)
    return dataset


# ---------------------------------------------------------------- forwards


@dataclass
class _Measured:
    """What the forwards of all models gave, by label."""

    logps: dict[str, PairScores] = field(default_factory=dict)
    samples: dict[str, list[TokenizedExample]] = field(default_factory=dict)
    """Answers drawn from each model that is no reference, where the KL is asked for."""
    own_logps: dict[str, np.ndarray] = field(default_factory=dict)
    """Of the samples under the model they are drawn from."""
    divergences: dict[Comparison, np.ndarray] = field(default_factory=dict)
    """Log model - log reference of samples."""


def _measure(
    scored: ScoredModel,
    examples: TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    measured: _Measured,
    config: ScoreConfig,
    runtime: Runtime,
    display: ProgressDisplay,
) -> None:
    """Load one model, and add what it gives to `measured`."""
    longest, label = int(examples.longest_side.max()), scored.label
    with opened(scored, longest, runtime, display, config) as model:
        with display.stage(f"score {label}", len(examples), "pair") as update:
            measured.logps[label] = score_examples(
                model.model,
                examples,
                model.layout,
                runtime.device,
                update,
                rows=config.per_device_eval_batch_size,
                max_tokens=config.max_tokens_per_microbatch,
                ranks=runtime,
            )
        if label not in config.reference_labels and config.kl_samples is not None:
            drawn = runtime.decide(lambda: _sample(model, examples, tokenizer, display, config))
            measured.samples[label] = drawn
            measured.own_logps[label] = _logps_of_samples(model, drawn, config, runtime)
        if label in config.reference_labels:
            for other, drawn in measured.samples.items():
                here = _logps_of_samples(model, drawn, config, runtime)
                far = measured.own_logps[other] - here
                measured.divergences[Comparison(other, label)] = far


def _sample(
    opened: OpenModel,
    examples: TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
    config: ScoreConfig,
) -> list[TokenizedExample]:
    """Answers of the model to the data's prompts, for the KL estimate."""
    assert config.kl_samples is not None  # asked for
    assert config.kl_max_new_tokens is not None  # filled by the config
    _, first = np.unique(examples.prompt_keys, return_index=True)
    prompts = [examples[int(row)] for row in np.sort(first)[: config.kl_samples]]
    number = config.kl_samples
    autocast = AUTOCAST[resolve_precision(config.mixed_precision)]
    with (
        generating(opened.loaded, autocast=autocast) as model,
        display.stage("sample", number, "answer") as update,
        explain_lack_of_memory(
            "while answers are sampled",
            model.device,
            lambda: f"the batch of prompts with up to {config.kl_max_new_tokens} new tokens",
            lambda: ["a lower --kl_max_new_tokens"],
        ),
    ):
        return sampled_answers(model, tokenizer, prompts, number, config.kl_max_new_tokens, update)


def _logps_of_samples(
    opened: OpenModel, samples: list[TokenizedExample], config: ScoreConfig, runtime: Runtime
) -> np.ndarray:
    sums = answer_logps(
        opened.model,
        samples,
        RowSizes.of(samples),
        opened.layout,
        runtime.device,
        rows=config.per_device_eval_batch_size,
        max_tokens=config.max_tokens_per_microbatch,
        ranks=runtime,
    )
    return sums[:, 0]


# ---------------------------------------------------------------- what they say


def _rewards(measured: _Measured, config: ScoreConfig) -> dict[Comparison, PairScores]:
    """Implicit rewards of every model against every other reference."""
    if config.beta is None:
        return {}
    logps = measured.logps
    return {
        Comparison(model, reference): logps[model].rewards_against(logps[reference], config.beta)
        for model, reference in config.comparisons
    }


def _sort(
    examples: TokenRows,
    measured: _Measured,
    rewards: dict[Comparison, PairScores],
    config: ScoreConfig,
) -> tuple[SortedPairs | None, dict[str, np.ndarray]]:
    """The rows of the lists, and the margins that they are sorted by; nothing if not asked for."""
    if config.lists is None:
        return None, {}
    margins = {str(pair): held.margins for pair, held in rewards.items()}
    if not margins:
        chosen, rejected = examples.num_scored.T
        margins = {
            label: rewards_without_reference(held, chosen, rejected).margins
            for label, held in measured.logps.items()
        }
    return sort_pairs(np.stack(list(margins.values()))), margins


def _summarise(
    examples: TokenRows,
    measured: _Measured,
    rewards: dict[Comparison, PairScores],
    found: SortedPairs | None,
    config: ScoreConfig,
) -> ScoreSummary:
    scores = {label: measured.logps[label] for _, label, _ in config.models_to_score}
    names = {label: name for name, label, _ in config.models_to_score}
    matched = equally_long(*examples.num_scored.T)
    return ScoreSummary(
        models={label: names[label] for label in config.model_labels},
        references={label: names[label] for label in config.reference_labels},
        beta=config.beta,
        total=with_divergences(summarise(scores, rewards, matched), measured.divergences),
        sources=summarise_sources(scores, rewards, matched, examples.sources),
        lists=None if found is None else found.counts,
    )


def _listed(
    examples: TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    found: SortedPairs,
    margins: dict[str, np.ndarray],
    config: ScoreConfig,
) -> list[dict[str, Any]]:
    assert config.list_size is not None  # filled by the config
    return listed_rows(examples, tokenizer, found, margins, config.list_size)


def _write(
    config: ScoreConfig,
    examples: TokenRows,
    measured: _Measured,
    rewards: dict[Comparison, PairScores],
    summary: ScoreSummary,
    listed: list[dict[str, Any]],
) -> None:
    if config.output:
        scores = {label: measured.logps[label] for _, label, _ in config.models_to_score}
        write_scores(Path(config.output).expanduser(), examples, scores, rewards, config)
    if config.summary:
        write_summary(Path(config.summary).expanduser(), summary)
    if config.lists:
        write_lists(Path(config.lists).expanduser(), listed)
