"""`preftune export`: the weights of any checkpoint as a model in the Hugging Face format."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from preftune.config.experiment import ExperimentConfig
from preftune.config.export import SaveDtype
from preftune.distributed.runtime import AUTOCAST
from preftune.errors import CheckpointError
from preftune.model.adapters import StartAdapter, add_adapter
from preftune.model.load import load_model, own_weights, saved_dtype, stop_at
from preftune.recipes.model_folder import write_model_folder
from preftune.recipes.pairs import prepare_tokenizer
from preftune.recipes.preflight import check_quantization
from preftune.training.integrity import MANIFEST, STATE, read_document
from preftune.training.restore import load_weights, taken_at_start
from preftune.training.run_folder import check_writable


def export(
    checkpoint: str, output_dir: str, save_dtype: SaveDtype, *, trust_remote_code: bool = False
) -> str:
    """Write a checkpoint's weights as `final/` would hold them.

    Architecture and tokenizer are those of the model that the run started from, which must still
    be there; its weights do not count. Of a run with an adapter, the adapter is written.

    Args:
        checkpoint: a folder such as RUN/checkpoints/step-00000100.
        output_dir: a folder that does not exist yet.
        save_dtype: of the weights; auto is the start model's.
        trust_remote_code: run code that comes with the start model.

    Returns:
        A sentence for people.

    Raises:
        PreftuneError: the checkpoint is damaged or none, or the folder exists or cannot be written.
    """
    source, target = Path(checkpoint).expanduser(), Path(output_dir).expanduser()
    if not any((source / name).is_file() for name in (MANIFEST, STATE)):
        raise CheckpointError(
            f"CHECKPOINT is {checkpoint!r}: no complete checkpoint is there (it would hold a "
            f"{MANIFEST}); give a folder such as RUN/checkpoints/step-00000100"
        )
    if target.exists():
        raise CheckpointError(f"OUTPUT_DIR is {output_dir!r}, which exists; give a new folder")
    check_writable("OUTPUT_DIR", target)
    document = read_document(source)
    facts = document["facts"]
    config = ExperimentConfig(**document["config"])
    config = replace(
        config,
        model_revision=facts["model_commit"],
        adapter_revision=facts["adapter_commit"],
        trust_remote_code=trust_remote_code,
    )
    tokenizer = prepare_tokenizer(config)
    check_quantization(config)
    loaded = load_model(config, torch.device("cpu"), AUTOCAST[facts["precision"]])
    start = StartAdapter.of(config, config.seed, taken_at_start(source))
    if start is not None:
        loaded.adapter = add_adapter(loaded.policy.model, start)
        _check_same_adapter(source, document["identity"]["adapter"], loaded.adapter.settings)
    load_weights(source, loaded.policy.model)
    if facts["stop_token_id"] is not None:
        stop_at(loaded.policy.model, facts["stop_token_id"])
    target.parent.mkdir(parents=True, exist_ok=True)
    facts |= {"steps": document["step"]}
    try:
        weights = own_weights(loaded, saved_dtype(loaded, save_dtype))
        dtype = write_model_folder(
            target, loaded, weights, tokenizer, config, facts, revision=facts["model_commit"]
        )
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written ({error}); free some space, or give another OUTPUT_DIR"
        ) from error
    return f"written: {target} (step {document['step']}, {dtype})"


def _check_same_adapter(checkpoint: Path, then: Any, now: dict[str, Any]) -> None:
    if then != now:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of an adapter with {then}, and adapter_name_or_path "
            f"now is one with {now}; put the adapter that the run was started with back"
        )
