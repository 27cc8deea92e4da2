"""`preftune score`: log-probs, implicit rewards and accuracy of a model on pairs."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.batching.micro_batches import RowSizes, largest, sorted_batches
from preftune.config.model import ModelConfig, another_model
from preftune.config.paths import cache_root
from preftune.config.score import ScoreConfig
from preftune.data.pairs import PairDataset
from preftune.data.table import TokenRows
from preftune.distributed.folders import look_at_folder
from preftune.distributed.ranks import ALONE, Ranks
from preftune.distributed.runtime import AUTOCAST, Runtime, resolve_precision
from preftune.errors import ConfigError
from preftune.evaluation.generation import generating
from preftune.evaluation.samples import sampled_answers
from preftune.files import replacing
from preftune.model.forward import pair_logps
from preftune.model.load import LoadedModel, check_model_files
from preftune.recipes.pairs import (
    check_fits_model,
    load_dataset_pairs,
    model_context,
    prepare_tokenizer,
)
from preftune.recipes.preflight import check_device, check_quantization, slow_settings
from preftune.recipes.same_start import agree_on_data, agree_on_start
from preftune.recipes.start_model import StartModel
from preftune.schema import TokenizedExample
from preftune.tracking.progress import ProgressDisplay
from preftune.training.memory import (
    explain_lack_of_memory,
    rows_and_tokens,
    scoring_remedies,
)
from preftune.training.run_folder import check_writable


@dataclass(frozen=True)
class PairScores:
    """Log-prob sums of a model on pairs, nats, fp64, one entry a pair."""

    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def likelihood_accuracy(self) -> float:
        """Share of pairs whose chosen answer is the more likely one."""
        return float((self.chosen > self.rejected).mean())


@dataclass(frozen=True)
class ScoreSummary:
    """What `preftune score` prints."""

    num_pairs: int
    logps_chosen: float
    logps_rejected: float
    likelihood_accuracy: float
    """Share of pairs where the model itself gives the chosen answer the higher log-prob."""
    reward_accuracy: float | None
    """Share of pairs with the higher implicit reward on the chosen side; None without reference."""
    reward_margin: float | None
    """Mean of beta x (chosen - rejected logratio); None without reference."""
    kl: float | None
    """Estimate of KL(model ‖ reference) in nats an answer, from samples; None unless asked for."""
    kl_error: float | None
    """Its standard error."""
    output: str | None

    def __str__(self) -> str:
        """The lines that the command prints."""
        lines = [
            f"pairs                      {self.num_pairs}",
            f"logps/chosen (mean)        {self.logps_chosen:.4f}",
            f"logps/rejected (mean)      {self.logps_rejected:.4f}",
            f"chosen more likely         {self.likelihood_accuracy:.4f}",
        ]
        if self.reward_accuracy is not None and self.reward_margin is not None:
            lines += [
                f"rewards/accuracies         {self.reward_accuracy:.4f}",
                f"rewards/margins (mean)     {self.reward_margin:.4f}",
            ]
        if self.kl is not None and self.kl_error is not None:
            lines.append(f"KL, nats an answer         {self.kl:.4f} ± {self.kl_error:.4f}")
        if self.output:
            lines.append(f"per pair                   {self.output}")
        return "\n".join(lines)


def score(config: ScoreConfig) -> ScoreSummary:
    """Score pairs under a model and, where given, a reference.

    The two models are loaded one after the other, so memory holds one at a time. Several ranks
    share the forwards.

    Args:
        config: model, pairs, reference.

    Returns:
        The means, on every rank; per-pair values go to `config.output` as parquet.
    """
    runtime = Runtime(resolve_precision(config.mixed_precision), seed=0)
    agree_on_start(config, runtime)
    runtime.decide(lambda: _check_output(config))
    models: list[ModelConfig] = [config]
    if config.reference_model_name_or_path:
        models.append(another_model(config, config.reference_model_name_or_path))

    def look() -> PreTrainedTokenizerBase:
        check_device(config, config.mixed_precision)
        check_quantization(config)
        if config.reference_model_name_or_path:
            check_model_files(config.reference_model_name_or_path, "reference_model_name_or_path")
        return prepare_tokenizer(config)

    tokenizer = runtime.together(look)
    display = ProgressDisplay(config.progress, is_main=runtime.is_main)
    for sentence in slow_settings(config, config.mixed_precision):
        display.say(sentence)
    cache = look_at_folder(runtime, "cache_dir", cache_root(config.cache_dir))
    dataset = runtime.leaders_first(
        lambda: _load(config, models, tokenizer, display), is_leader=cache.leads(runtime.rank)
    )
    agree_on_data({"to score": dataset}, runtime)

    def pairs_under(opened: OpenModel) -> PairScores:
        with display.stage("score", len(dataset.examples), "pair") as update:
            return score_examples(
                opened.model,
                dataset.examples,
                opened.layout,
                runtime.device,
                update,
                rows=config.per_device_eval_batch_size,
                max_tokens=config.max_tokens_per_microbatch,
                ranks=runtime,
            )

    longest = int(dataset.examples.longest_side.max())
    opened = open_model(config, longest, runtime, display, config)
    policy, reference, far = pairs_under(opened), None, None
    samples = runtime.decide(lambda: _sample(opened, dataset.examples, tokenizer, display, config))
    drawn = _logps_of_samples(opened, samples, config, runtime)
    if len(models) > 1:
        runtime.release(opened.model)
        del opened  # memory holds one model at a time
        opened = open_model(models[1], longest, runtime, display, config)
        reference = pairs_under(opened)
        far = drawn - _logps_of_samples(opened, samples, config, runtime)
    runtime.decide(lambda: _write(config, dataset.examples, policy, reference))
    margins = None
    if reference is not None and config.beta is not None:
        margins = config.beta * (
            (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        )
    return ScoreSummary(
        num_pairs=len(dataset.examples),
        logps_chosen=float(policy.chosen.mean()),
        logps_rejected=float(policy.rejected.mean()),
        likelihood_accuracy=policy.likelihood_accuracy,
        reward_accuracy=None if margins is None else float((margins > 0).mean()),
        reward_margin=None if margins is None else float(margins.mean()),
        kl=float(far.mean()) if samples and far is not None else None,
        kl_error=float(far.std(ddof=1) / len(far) ** 0.5) if samples and far is not None else None,
        output=config.output,
    )


def _load(
    config: ScoreConfig,
    models: Sequence[ModelConfig],
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
) -> PairDataset:
    """The pairs, which all models can take."""
    assert config.dataset_name is not None  # the config refuses an unset dataset
    contexts = [context for m in models if (context := model_context(m)) is not None]
    dataset = load_dataset_pairs(
        config,
        tokenizer,
        display,
        [(config.dataset_name, None)],
        config.dataset_split,
        context=min(contexts, default=None),
    )
    for model_config in models:
        check_fits_model(model_config, dataset)
    return dataset


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to score."""

    loaded: LoadedModel
    model: torch.nn.Module
    """The same, as the runtime has prepared it."""
    layout: Layout


def open_model(
    model_config: ModelConfig,
    longest: int,
    runtime: Runtime,
    display: ProgressDisplay,
    config: ScoreConfig,
) -> OpenModel:
    """Load a model, and choose how rows of at most `longest` tokens a side go through it."""
    display.say(f"loading {model_config.model_name_or_path}")
    start = StartModel.load(model_config, runtime, is_cut=False)
    loaded = start.loaded
    layout = start.lay_out(
        config.forward_layout, config.attn_implementation, longest, with_backward=False
    )
    if runtime.world_size > 1:
        start.identify(layout)
    if layout.why:
        display.say(f"pairs are padded: {layout.why}")
    model = runtime.prepare_for_inference(loaded.policy)
    return OpenModel(loaded, model, Layout(layout.name, loaded.policy.limits))


def _sample(
    opened: OpenModel,
    examples: TokenRows,
    tokenizer: PreTrainedTokenizerBase,
    display: ProgressDisplay,
    config: ScoreConfig,
) -> list[TokenizedExample]:
    """Answers of the model to the data's prompts, for the KL estimate; none unless asked for."""
    if config.kl_samples is None or config.kl_max_new_tokens is None:
        return []
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


def score_examples(
    model: torch.nn.Module,
    examples: TokenRows,
    layout: Layout,
    device: torch.device,
    update: Callable[[int], None] = lambda done: None,
    *,
    rows: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> PairScores:
    """Log-prob sums of every pair under a prepared model; arguments as `answer_logps`."""
    sums = answer_logps(
        model,
        examples,
        examples.sizes,
        layout,
        device,
        update,
        rows=rows,
        max_tokens=max_tokens,
        ranks=ranks,
    )
    return PairScores(sums[:, 0], sums[:, 1])


def answer_logps(
    model: torch.nn.Module,
    examples: Sequence[TokenizedExample],
    sizes: RowSizes,
    layout: Layout,
    device: torch.device,
    update: Callable[[int], None] = lambda done: None,
    *,
    rows: int | None = None,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> np.ndarray:
    """(rows, answers) Log-prob sums of every answer under a prepared model, nats, fp64.

    Forwards are the same however many ranks share them, so the values are, too.

    Args:
        model: in eval mode.
        examples: rows with the same number of answers each.
        sizes: theirs.
        layout: how they go through the model.
        device: of the model.
        update: called with the number of rows done.
        rows: most rows of a forward; None for any number.
        max_tokens: most token positions of a forward; None for any number.
        ranks: share the forwards, equally many each; all call this.
    """
    batcher = RowBatcher(examples, None, layout, device)
    batches = sorted_batches(sizes, layout.name, rows=rows, max_tokens=max_tokens)

    @torch.no_grad()
    def forward(batch: list[int]) -> np.ndarray:
        with _explained(batch, sizes, layout, device):
            result = pair_logps(model, batcher(batch).layout)
        return result.sums.view(len(batch), -1).cpu().numpy()

    def compute() -> list[np.ndarray]:
        found, done = [], 0
        for place in range(ranks.rank, len(batches) + ranks.rank, ranks.world_size):
            if place < len(batches):
                found.append(forward(batches[place]))
                done += len(batches[place]) * ranks.world_size
                update(min(done, len(sizes)))
            else:  # for nothing: some engines make every forward one of all ranks
                forward(batches[-1][-1:])
        return found

    mine = compute() if ranks.forwards_together else ranks.together(compute)
    sums = np.full((len(sizes), sizes.lengths.shape[-1] - 1 if len(sizes) else 1), math.nan)
    for rank, values in enumerate(ranks.gather(mine)):
        for batch, value in zip(batches[rank :: ranks.world_size], values, strict=True):
            sums[batch] = value
    return sums


def _explained(
    batch: Sequence[int], sizes: RowSizes, layout: Layout, device: torch.device
) -> AbstractContextManager[None]:
    def heaviest() -> tuple[int, int]:
        return largest([batch], sizes, layout.name)

    return explain_lack_of_memory(
        "while pairs are scored",
        device,
        lambda: f"a micro-batch ({rows_and_tokens(*heaviest())})",
        lambda: scoring_remedies(*heaviest()),
    )


def _write(
    config: ScoreConfig, examples: TokenRows, policy: PairScores, reference: PairScores | None
) -> None:
    if config.output:
        write_scores(Path(config.output), examples, policy, reference, config.beta)


def write_scores(
    path: Path,
    examples: Sequence[TokenizedExample],
    policy: PairScores,
    reference: PairScores | None,
    beta: float | None,
) -> None:
    """One parquet row a pair, in the order of the dataset."""
    columns: dict[str, object] = {
        "row_id": [example.row_id for example in examples],
        "source": [example.source for example in examples],
        "num_tokens_chosen": [example.completions[0].num_scored for example in examples],
        "num_tokens_rejected": [example.completions[1].num_scored for example in examples],
        "logps_chosen": policy.chosen,
        "logps_rejected": policy.rejected,
    }
    if reference is not None and beta is not None:
        columns |= {
            "reference_logps_chosen": reference.chosen,
            "reference_logps_rejected": reference.rejected,
            "reward_chosen": beta * (policy.chosen - reference.chosen),
            "reward_rejected": beta * (policy.rejected - reference.rejected),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _check_output(config: ScoreConfig) -> None:
    if config.output:
        check_writable("output", Path(config.output).expanduser().parent)
    if config.output and Path(config.output).exists():
        raise ConfigError(f"output is {config.output!r}, which exists; give another name")
