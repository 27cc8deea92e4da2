"""The models of `preftune score`: whole ones, and adapters on their bases."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.batching.layout import Layout
from preftune.config.lora import LoRAConfig
from preftune.config.model import QUANTIZATION, ModelConfig, another_model
from preftune.config.score import ScoreConfig
from preftune.distributed.runtime import Runtime
from preftune.errors import ConfigError, ModelError
from preftune.model.adapter_files import CONFIG_FILE, adapter_folder, base_record, read_config
from preftune.model.adapters import StartAdapter, check_adapter, skeleton
from preftune.model.load import LoadedModel, load_model_config, model_commit
from preftune.model.quantization import names_to_quantize
from preftune.recipes.pairs import prepare_tokenizer
from preftune.recipes.preflight import check_device, check_quantization
from preftune.recipes.reference import check_same_tokens
from preftune.recipes.start_model import StartModel
from preftune.tracking.progress import ProgressDisplay


@dataclass(frozen=True)
class ScoredModel:
    """One model, and how it is loaded."""

    label: str
    name: str
    """What the user calls it."""
    config: ModelConfig
    """Of the model, or of the adapter's base."""
    adapter: LoRAConfig | None

    @property
    def differs_from_training(self) -> str | None:
        """A sentence where an adapter's base was quantised in training otherwise than here."""
        if self.adapter is None:
            return None
        record = base_record(self.name, None, "the adapter")
        then = {key: value for key, value in record.items() if key in QUANTIZATION}
        if then == self.config.quantization:
            return None

        def told(options: dict[str, object]) -> str:
            return ", ".join(f"{key} {value}" for key, value in options.items()) or "plain weights"

        return (
            f"the adapter {self.name} was trained over a base with {told(then)}, and is scored "
            f"over one with {told(self.config.quantization)}"
        )


def look_at_models(config: ScoreConfig) -> tuple[list[ScoredModel], PreTrainedTokenizerBase]:
    """See that every model can be loaded and has the same tokens; no weights are read.

    Args:
        config: of the command.

    Returns:
        The models in the order in which they are scored, and the tokenizer of all.

    Raises:
        PreftuneError: one of them cannot be found or read, or has other tokens.
    """
    check_device(config, config.mixed_precision)
    check_quantization(config)
    models = [_scored(config, name, label, key) for name, label, key in config.models_to_score]
    tokenizer = None
    for model, (_, _, key) in zip(models, config.models_to_score, strict=True):
        base = None if model.adapter is None else f"the base that {model.name} names"
        model_commit(model.config, key=base or key)
        if tokenizer is None:  # that of model_name_or_path, which comes first
            tokenizer = prepare_tokenizer(model.config)
        else:
            check_same_tokens(model.config, tokenizer, key, model.name)
        _check_adapter(model)
    assert tokenizer is not None
    # What others are measured against comes last: it then scores the samples of those before.
    models.sort(key=lambda model: model.label in config.reference_labels)
    return models, tokenizer


def _scored(config: ScoreConfig, name: str, label: str, key: str) -> ScoredModel:
    is_first = name == config.model_name_or_path
    if not (Path(name).expanduser() / CONFIG_FILE).is_file():
        return ScoredModel(label, name, config if is_first else another_model(config, name), None)
    if is_first and config.model_revision is not None:
        raise ConfigError(
            f"model_revision is {config.model_revision!r}, but {name} is an adapter on this "
            "machine and has no revisions; leave it out"
        )
    folder = adapter_folder(name, None, key)
    files = read_config(folder, name, key)
    if not files.base_model_name_or_path:
        raise ModelError(
            f"{key} is {name!r}, an adapter whose {CONFIG_FILE} names no base; write it there "
            "(base_model_name_or_path), or merge the two (preftune merge)"
        )
    base = another_model(config, files.base_model_name_or_path, files.revision)
    if (folder / "tokenizer_config.json").is_file():
        base.tokenizer_name_or_path = str(folder)
    if is_first:
        base.chat_template = config.chat_template
        if config.tokenizer_name_or_path is not None:
            base.tokenizer_name_or_path = config.tokenizer_name_or_path
            base.tokenizer_revision = config.tokenizer_revision
    return ScoredModel(label, name, base, LoRAConfig(use_lora=True, adapter_name_or_path=name))


def _check_adapter(model: ScoredModel) -> None:
    if model.adapter is None:
        return
    base = skeleton(
        load_model_config(model.config), trust_remote_code=model.config.trust_remote_code
    )
    quantized = names_to_quantize(base) if model.config.is_quantized else frozenset()
    check_adapter(model.adapter, base, quantized)


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to score."""

    loaded: LoadedModel
    model: torch.nn.Module
    """The same, as the runtime has prepared it."""
    layout: Layout


@contextmanager
def opened(
    scored: ScoredModel,
    longest: int,
    runtime: Runtime,
    display: ProgressDisplay,
    config: ScoreConfig,
) -> Iterator[OpenModel]:
    """Load a model, choose how rows go through it, and let go of it at the end.

    Args:
        scored: which model.
        longest: most tokens of a prompt and an answer.
        runtime: the ranks.
        display: says what is loaded.
        config: how rows shall go through it.
    """
    display.say(f"loading {scored.name}")
    if (sentence := runtime.decide(lambda: scored.differs_from_training)) is not None:
        display.say(sentence)
    adapter = None if scored.adapter is None else StartAdapter(scored.adapter, seed=0)
    start = StartModel.load(scored.config, runtime, is_cut=False, adapter=adapter)
    loaded = start.loaded
    layout = start.lay_out(
        config.forward_layout, config.attn_implementation, longest, with_backward=False
    )
    if runtime.world_size > 1:
        start.identify(layout)
    if layout.why:
        display.say(f"pairs are padded: {layout.why}")
    model = runtime.prepare_for_inference(loaded.policy)
    try:
        yield OpenModel(loaded, model, Layout(layout.name, loaded.policy.limits))
    finally:
        runtime.release(model)
