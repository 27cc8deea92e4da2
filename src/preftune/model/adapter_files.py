"""Adapters on disk, in PEFT's format: found, refused where they cannot be right, read and written.

adapter_config.json           what the adapter is, and the base it belongs to
adapter_model.safetensors     its numbers
preftune.json                 how its base was quantised, where it was: that is part of what was
                              trained, and PEFT's format has no place for it

PEFT is imported where it is used: it brings bitsandbytes and PyTorch's compiler along, for which a
run without adapters need not wait.
"""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from preftune.config.model import QUANTIZATION, ModelConfig
from preftune.config.typed import reader_of
from preftune.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
"""The name that an adapter has inside a model."""
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RECORD_FILE = "preftune.json"
PREFIX = "base_model.model."
"""What PEFT's files put in front of the model's own names."""

_UNREAD = {
    "bias": "trains biases of its base",
    "layer_replication": "repeats layers of its base",
    "trainable_token_indices": "trains single tokens",
    "target_parameters": "adapts parameters, not layers",
    "alora_invocation_tokens": "is active on a part of the tokens only",
    "arrow_config": "is a mixture of adapters",
    "kasa_config": "changes its base's weights",
}
"""Fields of a LoRA config that mean more than A and B beside a layer."""


def adapter_folder(name: str, revision: str | None, key: str) -> Path:
    """Where an adapter's two files are.

    Args:
        name: a folder, or a name on the Hub.
        revision: of it, on the Hub.
        key: the option that named it.

    Raises:
        ModelError: it is no adapter in PEFT's format, or its weights are pickled.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"adapter_revision is {revision!r}, but {name} is on this machine and has no "
                "revisions; leave it out"
            )
        if not (folder / CONFIG_FILE).is_file():
            raise ModelError(
                f"{key} is {name!r}: the folder has no {CONFIG_FILE}; give a LoRA adapter in "
                "PEFT's format"
            )
        if not (folder / WEIGHTS_FILE).is_file():
            raise ModelError(f"{key} is {name!r}: {_no_weights(folder)}")
        return folder
    if name.startswith(("/", ".", "~")):
        raise ModelError(
            f"{key} is {name!r}: no such folder; give a folder with an {CONFIG_FILE}, or a name on "
            "the Hub"
        )
    try:
        hf_hub_download(name, CONFIG_FILE, revision=revision)
        return Path(hf_hub_download(name, WEIGHTS_FILE, revision=revision)).parent
    except Exception as error:  # whatever the Hub's client makes of names and networks
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{key} is {name!r}: its {CONFIG_FILE} and {WEIGHTS_FILE} cannot be had ({reason}); "
            "check the name, the network and your access rights"
        ) from error


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return (
            "its weights are pickled (adapter_model.bin): reading a pickle may run code, so "
            "preftune does not; where you trust it, load it with peft and save it again "
            "(save_pretrained writes safetensors)"
        )
    return f"the folder has no {WEIGHTS_FILE}; copy it there"


def read_config(folder: Path, name: str, key: str) -> "LoraConfig":
    """What an adapter is.

    Args:
        folder: where its files are.
        name: what the user calls it.
        key: the option that named it.

    Raises:
        ModelError: it is of a kind that cannot be trained here.
    """
    from peft import LoraConfig

    try:
        kind = json.loads((folder / CONFIG_FILE).read_text("utf-8")).get("peft_type")
        config = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{key} is {name!r}: {CONFIG_FILE} cannot be read ({reason})") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"{key} is {name!r}, whose peft_type is {kind}; give a LoRA adapter")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ModelError(
            f"{key} is {name!r}, whose task_type is {config.task_type}; give one for CAUSAL_LM"
        )
    for field, what in _UNREAD.items():
        if getattr(config, field, None) not in (None, "none", False):
            raise ModelError(
                f"{key} is {name!r}, which {what} ({field} in its {CONFIG_FILE}); give an adapter "
                "without that, or one that is merged (peft's merge_and_unload) as the model"
            )
    init = config.init_lora_weights
    if not (isinstance(init, bool) or init == "gaussian" or moves_base(init)):
        raise ModelError(
            f"{key} is {name!r}, whose init_lora_weights is {init!r}: it may belong to a base with "
            "changed weights; save it as a plain LoRA (peft's save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    config.inference_mode = False  # it goes on training
    return config


def moves_base(init: object) -> bool:
    """Whether an initialisation takes what the adapter begins with out of its base: PiSSA."""
    return isinstance(init, str) and init.startswith("pissa")


def base_record(name: str, revision: str | None, key: str) -> dict[str, Any]:
    """How the base of an adapter was quantised, and its dtype, as options; empty: not, or unknown.

    Args:
        name: see `adapter_folder`.
        revision: of it, on the Hub.
        key: the option that named it.

    Raises:
        ModelError: what the file says cannot be read.
    """
    file = adapter_folder(name, revision, key) / RECORD_FILE
    if not Path(name).expanduser().is_dir():
        with suppress(EntryNotFoundError):
            hf_hub_download(name, RECORD_FILE, revision=revision)
    if not file.is_file():
        return {}
    reader = reader_of(ModelConfig)
    try:
        given = json.loads(file.read_text("utf-8"))["base"]
        if other := set(given) - {*QUANTIZATION, "dtype"}:
            raise ValueError(f"{min(other)} is not known")
        record = {field: reader.read(field, value) for field, value in given.items()}
        if problems := ModelConfig(model_name_or_path=name, **record).problems():
            raise ValueError(str(problems[0]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{key} is {name!r}: its {RECORD_FILE} cannot be read ({error})"
        ) from error
    return record


def file_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in an adapter's file, by the model's own names; reads no numbers."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        return {
            name.removeprefix(PREFIX): tuple(file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118  # it is no mapping
        }


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The numbers of an adapter, by the model's own names."""
    return {k.removeprefix(PREFIX): v for k, v in load_file(folder / WEIGHTS_FILE).items()}


def named_as_in_files(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's numbers by the names of its file, but for `PREFIX`.

    Args:
        model: that has the adapter.
        weights: by the names of its parameters; others are left out.
    """
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(
        model, state_dict=dict(weights), adapter_name=ADAPTER, save_embedding_layers=False
    )


def write_adapter(
    folder: Path,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
    base: str,
    revision: str | None,
    record: Mapping[str, Any],
) -> torch.dtype:
    """Write the two files, so that they are right beside the base as its own files have it.

    Args:
        folder: is made.
        model: that has the adapter.
        weights: what trains, by the names of its parameters.
        taken: what the base gave up to the adapter at its start, see `Adapter.taken`.
        base: name of the base.
        revision: of it, on the Hub.
        record: how it was quantised, see `base_record`; empty where it was not.

    Returns:
        The dtype of the numbers.
    """
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])
    numbers = named_as_in_files(model, weights)
    dtype = next(tensor.dtype for tensor in numbers.values())
    if taken:
        numbers = _beside_whole_base(model, config, numbers, named_as_in_files(model, taken))
    config.inference_mode = True
    config.init_lora_weights = True
    config.base_model_name_or_path, config.revision = base, revision
    config.target_modules = target_names(model)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    contiguous = {PREFIX + name: t.to(dtype).contiguous() for name, t in numbers.items()}
    save_file(contiguous, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if record:
        (folder / RECORD_FILE).write_text(json.dumps({"base": dict(record)}, indent=2) + "\n")
    return dtype


def adapted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's layers, by the names of those whose places they took."""
    from peft.tuners.lora import LoraLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]


def target_names(model: PreTrainedModel) -> list[str]:
    """The layers with adapters: by the ends of their names where those are of no other layer."""
    names = [name for name, _ in adapted_layers(model)]
    inside = tuple(f"{name}." for name in names)
    others = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    ends = sorted({name.rpartition(".")[2] for name in names})
    meant = [name for name in others if name.rpartition(".")[2] in ends]
    return ends if meant == names else sorted(names)


def _beside_whole_base(
    model: PreTrainedModel,
    config: Any,
    numbers: Mapping[str, Tensor],
    taken: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """An adapter of twice the rank, for a base that has not given anything up.

    W = W' + s B0 A0 was the base, W' + s B A is the model: W + s (B A - B0 A0). The factor s goes
    into B, so that every kind of scaling comes out as 1.
    """
    whole = dict(numbers)
    scales = {name: layer.scaling[ADAPTER] for name, layer in adapted_layers(model)}
    for name, first in taken.items():
        layer, kind = name.removesuffix(".weight").rsplit(".", 1)
        now, scale = numbers[name].to(first.dtype), scales[layer]
        if kind == "lora_A":
            whole[name] = torch.cat([now, first.to(now.device)])
        else:
            whole[name] = scale * torch.cat([now, -first.to(now.device)], dim=1)
    config.r *= 2
    config.lora_alpha = config.r
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = dict(config.rank_pattern)
    config.use_rslora = False
    return whole
