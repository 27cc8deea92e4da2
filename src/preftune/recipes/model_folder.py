"""A trained model or adapter in the Hugging Face format: written whole or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from preftune.config.experiment import ExperimentConfig
from preftune.files import fsync, remove_tree
from preftune.model.adapter_files import write_adapter
from preftune.model.load import LoadedModel, save_model
from preftune.model.quantization import base_as_trained
from preftune.recipes.model_card import model_card
from preftune.redaction import redacted


def write_model_folder(
    folder: Path,
    loaded: LoadedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    config: ExperimentConfig,
    facts: Mapping[str, Any],
    *,
    revision: str | None,
) -> str:
    """Write weights, config, tokenizer and model card beside their place, and rename them there.

    Args:
        folder: where the model goes; what is there is replaced.
        loaded: the model's architecture and config; where it has an adapter, that is written.
        weights: see `save_model`.
        tokenizer: of the model.
        config: of the run that trained it.
        facts: of the run, for the card: as in run.json.
        revision: commit of the model that the run started from, if it came from a hub.

    Returns:
        The dtype of the weights.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    temporary = folder.with_name(f".partial-{folder.name}")
    remove_tree(temporary)
    try:
        record = base_as_trained(loaded.policy.model, config)
        if loaded.adapter is None:
            dtype = save_model(loaded, weights, tokenizer, temporary)
        else:
            dtype = write_adapter(
                temporary,
                loaded.policy.model,
                weights,
                loaded.adapter.taken,
                base=str(config.model_name_or_path),
                revision=revision,
                record=record,
            )
            tokenizer.save_pretrained(temporary)
        name = str(dtype).removeprefix("torch.")
        facts = {**facts, "save_dtype": name}
        card = model_card(config, facts, loaded.adapter is not None, record)
        (temporary / "README.md").write_text(redacted(card), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
        remove_tree(folder)
        temporary.rename(folder)
        fsync(folder.parent)
    except SafetensorError as error:  # its name for a full disk, too
        raise OSError(str(error)) from error
    finally:
        remove_tree(temporary)
    return name
