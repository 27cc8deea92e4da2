"""Tokenizer and datasets of an experiment: all that can be checked before weights load."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.dataset import PairsConfig
from preftune.config.dpo import DPOConfig
from preftune.config.experiment import ExperimentConfig
from preftune.config.model import ModelConfig
from preftune.config.paths import cache_root
from preftune.config.training import TrainingConfig
from preftune.data.chat import set_chat_template
from preftune.data.hub_cache import HubCache
from preftune.data.pairs import PairDataset, SourceCounts, load_pairs
from preftune.data.splits import shares_prompt, split_by_prompt, without_prompts_of
from preftune.data.table import TokenRows
from preftune.errors import ConfigError, DataError, Findings, ModelError
from preftune.model.load import load_model_config, load_tokenizer, model_commit
from preftune.model.rope import longest_sequence
from preftune.schema import RowKind
from preftune.tracking.progress import ProgressDisplay, counting
from preftune.training.run_folder import check_writable


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs of an experiment."""

    train: PairDataset
    held_out: dict[str, PairDataset]
    """Label -> pairs; the label of a single set is empty."""

    shared: TokenRows
    """Rows left out of training because `eval_dataset` has their prompts."""

    @property
    def by_use(self) -> dict[str, PairDataset]:
        """All of them, by what people call their use."""
        held_out = {f"held out {label}".rstrip(): data for label, data in self.held_out.items()}
        return {"to train on": self.train, **held_out}

    @property
    def longest_side(self) -> int:
        """Tokens of the longest prompt and answer."""
        sets = (self.train, *self.held_out.values())
        return max(int(dataset.examples.longest_side.max()) for dataset in sets)

    def describe(self) -> dict[str, Any]:
        """What run.json says of them."""
        sets = {"train": self.train}
        sets |= {f"held_out/{label}".rstrip("/"): data for label, data in self.held_out.items()}
        return {
            label: {"name": dataset.name, "fingerprint": dataset.examples.fingerprint()}
            | {"num_pairs": len(dataset.examples), "num_tokens": _lengths(dataset.examples)}
            | dataset.counts.as_dict()
            | {"sources": [source.as_dict() for source in dataset.sources]}
            for label, dataset in sets.items()
        }


def _lengths(examples: TokenRows) -> dict[str, dict[str, int]]:
    """Tokens of prompts and answers, as they are trained on."""
    is_pair = examples[0].roles[1:] == ("rejected",)
    answers = ("chosen", "rejected") if is_pair else ("answer", "mismatched answer")
    return {
        name: {
            "shortest": int(column.min()),
            "median": int(np.median(column)),
            "95 % below": int(np.percentile(column, 95)),
            "longest": int(column.max()),
        }
        for name, column in zip(("prompt", *answers), examples.lengths.T, strict=False)
    }


def prepare_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template that the config asks for."""
    model_commit(config)  # refuses a model or a revision that is not there
    tokenizer = load_tokenizer(config)
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    return tokenizer


def load_experiment_pairs(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, display: ProgressDisplay
) -> Pairs:
    """Read, check and tokenise training and held-out pairs, and say what was kept."""
    pairs = read_experiment_pairs(config, tokenizer, display)
    for dataset in (pairs.train, *pairs.held_out.values()):
        for model in config.models:
            check_fits_model(model, dataset)
        for sentence in margin_use(config, dataset):
            display.say(sentence)
    train, held_out = pairs.train.repeated(), pairs.held_out
    if config.reads_mismatched:
        train = with_mismatched(train, config.seed)
        held_out = {label: with_mismatched(d, config.seed) for label, d in held_out.items()}
    return replace(pairs, train=train, held_out=held_out)


def with_mismatched(dataset: PairDataset, seed: int) -> PairDataset:
    """The same rows, each with an answer to another prompt behind its own."""
    return replace(dataset, examples=dataset.examples.with_mismatched(seed))


def margin_use(config: DPOConfig, dataset: PairDataset) -> list[str]:
    """A sentence on margins that the loss does not read.

    Raises:
        DataError: the loss reads margins, and a row has none.
    """
    has_one = ~np.isnan(dataset.examples.margins)
    losses = ", ".join(loss.value for loss in config.loss_types) or f"stage {config.stage}"
    if not config.reads_margin:
        number = int(has_one.sum())
        unread = f"{number} rows of {dataset.name} have a margin, which {losses} does not read"
        return [f"{unread} (odpo does)"] if number else []
    if not has_one.all():
        lacking = np.flatnonzero(~has_one)
        raise DataError(
            f"{dataset.name}: {len(lacking)} of {len(has_one)} rows have no margin (first: "
            f"{dataset.examples.row_id(int(lacking[0]))}), and the loss {losses} reads one: by how "
            "much chosen is better, in units of reward. Add a number in column 'margin', name "
            "yours with --column_map, or choose another --loss_type"
        )
    return []


def read_experiment_pairs(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, display: ProgressDisplay
) -> Pairs:
    """Training and held-out pairs, each row once, not yet compared with the model.

    No prompt is on both sides: `test_size` splits by prompt, and rows whose prompt stands in
    `eval_dataset` are left out of training.
    """
    train, held_out = _load_all(config, tokenizer, display)
    if config.test_size is not None:
        shared = train.examples[:0]
        train, test = split_by_prompt(train, config.test_size, config.seed)
        held_out = {"": test}
        display.say(
            f"split by prompt: {len(train.examples)} {train.unit} to train on, "
            f"{len(test.examples)} held out"
        )
    else:
        others = list(held_out.values())
        shared = train.examples.take(np.flatnonzero(shares_prompt(train, others)))
        train = without_prompts_of(train, others)
        if shared:
            display.say(
                f"{len(shared)} {train.unit} are left out of training: eval_dataset has their "
                "prompts too"
            )
    return Pairs(train, held_out, shared)


def prepare_data(config: ExperimentConfig) -> str:
    """Tokenise what a run reads, so that the run finds it; loads no weights.

    Returns:
        What was made or found, and where, for people.

    Raises:
        PreftuneError: what would stop the run at its data.
    """
    if config.dataset_cache_mode == "off":
        raise ConfigError(
            "dataset_cache_mode is 'off', so there is no cache to fill; leave it out, or choose "
            "local"
        )
    cache = cache_root(config.cache_dir)
    check_writable("cache_dir", cache)
    tokenizer = prepare_tokenizer(config)
    pairs = load_experiment_pairs(config, tokenizer, ProgressDisplay(config.progress))
    # Pairs split off training data are in its cache.
    held_out = () if config.test_size is not None else pairs.held_out.values()
    lines = [
        f"{dataset.name}: {'found in the cache' if dataset.reused else 'tokenised'}, "
        f"{sum(source.counts.read for source in dataset.sources)} rows"
        for dataset in (pairs.train, *held_out)
    ]
    return "\n".join([*lines, f"tokens are in {cache / 'datasets'}"])


def _load_all(
    config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, display: ProgressDisplay
) -> tuple[PairDataset, dict[str, PairDataset]]:
    """The datasets as they are named; what is wrong with several is told at once."""
    contexts = [context for m in config.models if (context := model_context(m)) is not None]
    context = min(contexts, default=None)
    findings = Findings()
    train, held_out = None, {}
    with findings:
        train = load_dataset_pairs(
            config,
            tokenizer,
            display,
            config.sources,
            config.dataset_split,
            context=context,
            max_rows=config.max_train_samples,
            seed=config.seed,
            kind=config.row_kind,
        )
    for label, name in config.eval_sources.items():
        with findings:
            held_out[label] = load_dataset_pairs(
                config,
                tokenizer,
                display,
                [(name, None)],
                config.eval_split or "test",
                context=context,
                kind=config.row_kind,
            )
    findings.raise_all()
    assert train is not None  # or there was a finding
    return train, held_out


def load_dataset_pairs(
    config: PairsConfig,
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
    sources: Sequence[tuple[str, int | float | None]],
    split: str,
    *,
    context: int | None,
    max_rows: int | None = None,
    seed: int = 0,
    kind: RowKind = "pairs",
) -> PairDataset:
    """Read, check and tokenise one dataset, or a mix of several, and say what was kept."""
    for name, _ in sources:
        if split not in ("train", "test") and Path(name).expanduser().is_file():
            raise ConfigError(
                f"the split asked for is {split!r}, but {name} is one file without splits; leave "
                "it out"
            )
    cache = cache_root(config.cache_dir) / "datasets"
    with display.stage("tokenise", None, "row") as update:
        dataset = load_pairs(
            sources,
            split=split,
            tokenizer=tokenizer,
            column_map=config.column_map,
            transforms=config.dataset_transforms or (),
            max_length=config.max_length,
            max_prompt_length=config.max_prompt_length,
            truncation=config.truncation,
            context=context,
            max_dropped_fraction=config.max_dropped_fraction,
            max_rows=max_rows,
            seed=seed,
            cache=None if config.dataset_cache_mode == "off" else cache,
            hub=HubCache() if config.dataset_cache_mode == "hub" else None,
            num_proc=config.num_proc or 1,
            progress=counting(update),
            kind=kind,
        )
    display.say(describe_counts(dataset))
    return dataset


def model_context(config: ModelConfig) -> int | None:
    """Positions of the model, which a row cannot exceed; None where it has no such bound."""
    return longest_sequence(load_model_config(config))


def check_fits_model(config: ModelConfig, dataset: PairDataset) -> None:
    """Refuse rows that model and settings do not fit, before weights load.

    Raises:
        ConfigError: a chat template has no use.
        ModelError: the tokenizer makes ids that the model does not have.
    """
    examples = dataset.examples
    if config.chat_template is not None and examples.is_text.all():
        raise ConfigError(
            f"chat_template is {config.chat_template!r}, but all rows of {dataset.name} are plain "
            "text, to which no template applies; leave it out, or give messages"
        )
    model_config = load_model_config(config).get_text_config()
    if examples.highest_id >= model_config.vocab_size:
        raise ModelError(
            f"the tokenizer makes token {examples.highest_id}, and {config.model_name_or_path} has "
            f"only {model_config.vocab_size} tokens; tokenizer_name_or_path must name its own "
            "tokenizer"
        )


def over_budget(config: TrainingConfig, dataset: PairDataset) -> list[str]:
    """A sentence on pairs that fill more than a micro-batch, where there are any."""
    budget = config.max_tokens_per_microbatch
    tokens = dataset.examples.lengths.sum(axis=1)
    if budget is None or tokens.max() <= budget:
        return []
    number = int((tokens > budget).sum())
    return [
        f"{number} {dataset.unit} of {dataset.name} have more than max_tokens_per_microbatch "
        f"({budget}) tokens, the longest {tokens.max()}: each is trained alone, in more memory"
    ]


def describe_counts(dataset: PairDataset) -> str:
    """Rows read, kept, and dropped by reason: a line, and one more for each source of a mix."""
    counts = dataset.counts
    drawn = [source for source in dataset.sources if source.amount is not None]
    lines = [_describe_source(source, dataset.unit) for source in drawn]
    text = f"{dataset.name}: {counts.read} rows read, {counts.kept} kept"
    dropped = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
    if dropped:
        first = ", ".join(f"{row} ({reason})" for row, reason in counts.dropped_rows[:3])
        text += f", dropped: {dropped} (first: {first})"
    if counts.truncated:
        text += f", {counts.truncated} truncated"
    if dataset.num_text_rows:
        text += f"; {dataset.num_text_rows} are plain text, without a chat template"
    if dataset.reused:
        text += "; tokens from the cache"
    return "\n".join([text, *lines])


def _describe_source(source: SourceCounts, unit: str) -> str:
    usable = source.counts.kept + source.counts.not_drawn
    if isinstance(source.amount, int):
        rows = "row" if source.amount == 1 else "rows"
        asked = f"{source.amount} {rows}, for {source.amount} is a number of rows"
        if source.amount == 1:
            asked += " (all of them would be 1.0)"
    else:
        asked = f"{source.amount} of the rows"
        if source.amount == 1:
            asked += ", all of them (a single row would be 1)"
    return f"  {source.name}: {source.num_drawn} of {usable} {unit}: {asked}"
