"""Low-rank adapters inside a model: which layers get one, and how it begins.

PEFT puts its layers in place of the model's, so that the model stays what transformers made: its
backbone, its head and its attention are found where they were.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from preftune.config.lora import ALL_LINEAR, LoRAConfig
from preftune.errors import ConfigError, ModelError
from preftune.model.adapter_files import (
    ADAPTER,
    adapted_layers,
    adapter_folder,
    file_shapes,
    moves_base,
    named_as_in_files,
    read_config,
    read_weights,
)

if TYPE_CHECKING:
    from peft import LoraConfig

_KEY = "adapter_name_or_path"
_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding)
_LISTED = 12
"""Most names that a message lists."""


@dataclass(frozen=True)
class StartAdapter:
    """What a model gets before anything is done with it."""

    lora: LoRAConfig
    """With the commit of `adapter_name_or_path` as its revision."""
    seed: int
    """Of the numbers of a new adapter: they are the same on all ranks and in all runs."""
    taken: Mapping[str, Tensor] | None = None
    """What the base gave up when the run began, see `Adapter`; None: it begins now."""

    @classmethod
    def of(
        cls, lora: LoRAConfig, seed: int, taken: Mapping[str, Tensor] | None = None
    ) -> "StartAdapter | None":
        """The one that a configuration asks for; None where all weights train."""
        return cls(lora, seed, taken) if lora.use_lora else None


@dataclass(frozen=True)
class Adapter:
    """The adapter that a model has got."""

    settings: dict[str, Any]
    """What its product depends on besides its numbers, as plain values."""
    taken: dict[str, Tensor]
    """The factors that PiSSA took out of the base's weights, by the names of parameters, in the
    host's memory; empty with other initialisations, and where the model has no numbers."""


def commit_of(lora: LoRAConfig) -> str | None:
    """The commit that `adapter_revision` stands for now; None for a new adapter or a folder's.

    Raises:
        ModelError: it cannot be found.
    """
    if lora.adapter_name_or_path is None:
        return None
    folder = adapter_folder(lora.adapter_name_or_path, lora.adapter_revision, _KEY)
    # The folder of a file in the Hub's cache is named by the commit.
    return folder.name if folder.parent.name == "snapshots" else None


def peft_config(lora: LoRAConfig) -> "LoraConfig":
    """PEFT's form of the settings: the user's, or those of the adapter to go on with.

    Raises:
        ModelError: that adapter cannot be found, or not be trained here.
    """
    name = lora.adapter_name_or_path
    if name is None:
        from peft import LoraConfig

        assert lora.lora_r is not None  # the config fills these for a new adapter
        assert lora.lora_alpha is not None
        init = lora.init_lora_weights
        return LoraConfig(
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout or 0.0,
            target_modules=lora.lora_target_modules,
            task_type=lora.lora_task_type,
            modules_to_save=lora.modules_to_save,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=True if init == "default" else init,  # pyright: ignore[reportArgumentType]
        )
    config = read_config(adapter_folder(name, lora.adapter_revision, _KEY), name, _KEY)
    if lora.lora_dropout is not None:
        config.lora_dropout = lora.lora_dropout
    return config


# ---------------------------------------------------------------- before weights load


def skeleton(model_config: PreTrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """A model's layers, without numbers or memory for them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)


def check_adapter(
    lora: LoRAConfig, model: PreTrainedModel, quantized: Set[str] = frozenset()
) -> None:
    """Refuse an adapter that the model cannot have.

    Args:
        lora: what is asked for.
        model: see `skeleton`; gets the adapter's layers.
        quantized: its layers that will be quantised.

    Raises:
        ConfigError: names that are none of its layers, or layers that cannot have one.
        ModelError: the adapter to go on with cannot be read, or belongs to another base.
    """
    config = peft_config(lora)
    targets = _check_targets(model, config)
    _check_whole_layers(model, config.modules_to_save, quantized)
    if moves_base(config.init_lora_weights):
        if quantized:
            raise ModelError(
                f"{_KEY} is {lora.adapter_name_or_path!r}, an adapter that began with pissa: what "
                "that takes out of a weight, a quantised one cannot give up; leave out "
                "load_in_4bit and load_in_8bit, or save the adapter as a plain LoRA (peft's "
                "save_pretrained with path_initial_model_for_weight_conversion)"
            )
        _check_rank(config, targets)
    inject(model, config, seed=0)
    if lora.adapter_name_or_path is not None:
        _check_shapes(lora, model)


def _check_targets(model: PreTrainedModel, config: "LoraConfig") -> dict[str, nn.Module]:
    """The layers that `target_modules` names."""
    named = {name: module for name, module in model.named_modules() if name}
    wanted = config.target_modules
    if wanted == ALL_LINEAR:
        head = model.get_output_embeddings()
        return {name: named[name] for name in _adaptable(named) if named[name] is not head}
    if isinstance(wanted, str):
        names = _matching(wanted, named)
    else:
        names = [n for n in named if any(_ends_in(n, end) for end in wanted or ())]
        for end in sorted(wanted or ()):
            if not any(_ends_in(name, end) for name in named):
                raise _unknown("lora_target_modules", end, _adaptable(named))
    if not names:
        raise ConfigError(
            f"lora_target_modules is {wanted!r}, a regular expression, and no layer's whole name "
            f"matches it; names are such as {_adaptable(named)[0]}; a list of the ends of names is "
            "written [q_proj, v_proj]"
        )
    tied = _tied_layers(model)
    for name in names:
        if not isinstance(named[name], _ADAPTABLE):
            raise ConfigError(
                f"lora_target_modules names {name}, which is a {type(named[name]).__name__} and "
                f"not a linear layer or an embedding; {_names_are(_adaptable(named))}"
            )
        if name in tied:
            raise _is_tied("lora_target_modules", name)
    return {name: named[name] for name in names}


def _matching(pattern: str, named: Mapping[str, nn.Module]) -> list[str]:
    try:
        return [name for name in named if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(
            f"lora_target_modules is {pattern!r}, which is no regular expression ({error}); give "
            "all-linear, or a list of names such as [q_proj, v_proj]"
        ) from error


def _check_whole_layers(
    model: PreTrainedModel, wanted: list[str] | None, quantized: Set[str]
) -> None:
    names = [name for name, _ in model.named_modules() if name]
    tied = _tied_layers(model)
    for end in wanted or ():
        meant = [name for name in names if name.endswith(end)]  # as PEFT matches them
        if not meant:
            raise _unknown("modules_to_save", end, names)
        if both := tied.intersection(meant):
            raise _is_tied("modules_to_save", min(both))
        if packed := [n for n in quantized if any(f"{n}.".startswith(f"{m}.") for m in meant)]:
            raise ConfigError(
                f"modules_to_save names {end!r}, and {min(packed)} is quantised, so that it "
                "cannot train whole; leave it out: an adapter trains there"
            )


def _check_rank(config: "LoraConfig", targets: Mapping[str, nn.Module]) -> None:
    for name, module in targets.items():
        if isinstance(module, nn.Embedding):
            raise ConfigError(
                f"init_lora_weights is {config.init_lora_weights!r}, and lora_target_modules names "
                f"{name}, an embedding, which cannot begin so; leave it out"
            )
        smallest = min(module.weight.shape)  # pyright: ignore
        if config.r > smallest:
            raise ConfigError(
                f"lora_r is {config.r}, and init_lora_weights {config.init_lora_weights!r} takes "
                f"that many singular directions of {name}, which has {smallest}; lower lora_r"
            )


def _check_shapes(lora: LoRAConfig, model: PreTrainedModel) -> None:
    name = str(lora.adapter_name_or_path)
    folder = adapter_folder(name, lora.adapter_revision, _KEY)
    try:
        there = file_shapes(folder)
    except Exception as error:  # whatever a library makes of a damaged or crafted file
        raise ModelError(f"{_KEY} is {name!r}: its weights cannot be read ({error})") from error
    own = {k: tuple(v.shape) for k, v in named_as_in_files(model, model.state_dict()).items()}
    wrong = [key for key in sorted({*own, *there}) if own.get(key) != there.get(key)]
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{_KEY} is {name!r}, an adapter of another model than model_name_or_path: {first} is "
            f"{there.get(first, 'absent')} in it and {own.get(first, 'absent')} here "
            f"({len(wrong)} such); give the base that it was trained on"
        )


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _adaptable(named: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, module in named.items() if isinstance(module, (nn.Linear, Conv1D))]


def _unknown(key: str, end: str, names: list[str]) -> ConfigError:
    ends = sorted({name.rpartition(".")[2] for name in names} - {str(i) for i in range(1000)})
    near = get_close_matches(end.rpartition(".")[2], ends, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"{key} names {end!r}, and no layer of the model is called so; {hint}{_names_are(names)}"
    )


def _names_are(names: list[str]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    shown = [end for end in ends if not end.isdigit()]
    more = ", ..." if len(shown) > _LISTED else ""
    return f"its names are {', '.join(shown[:_LISTED])}{more}"


def _tied_layers(model: PreTrainedModel) -> set[str]:
    """Embedding and head, where they share their weight."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return set()
    return {name for name, module in model.named_modules() if module in (head, embedding)}


def _is_tied(key: str, name: str) -> ConfigError:
    return ConfigError(
        f"{key} names {name}, whose weight is the embedding's and the head's at once "
        "(tie_word_embeddings): an adapter of one of them would part the two; leave it out"
    )


# ---------------------------------------------------------------- into a model


def inject(model: PreTrainedModel, config: "LoraConfig", *, seed: int) -> None:
    """Put adapter layers into a model; only they, and `modules_to_save`, will train.

    Adapters are in fp32 whatever their base is in: small updates would be lost in bf16.

    Args:
        model: changed in place; on "meta" the adapter is there too, and has no numbers.
        config: what to put where; may be changed. What PiSSA does comes after, see `add_adapter`.
        seed: of the first numbers.
    """
    from peft import inject_adapter_in_model

    on_meta = next(model.parameters()).is_meta
    init = config.init_lora_weights
    if moves_base(init):
        config.init_lora_weights = True
    if any(isinstance(module, Conv1D) for module in model.modules()):
        config.fan_in_fan_out = True  # PEFT's word for GPT-2's transposed weights
    with _seeded(model, seed), warnings.catch_warnings():
        # Where a model has layers of both kinds, PEFT sets fan_in_fan_out layer by layer.
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        inject_adapter_in_model(config, model, ADAPTER)
    config.init_lora_weights = init
    for _, layer in adapted_layers(model):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if on_meta:
        nn.Module.to(model, "meta")
    model.eval()


@contextmanager
def _seeded(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the generators as they were."""
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield


def whole_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """PEFT's wrappers of layers that train whole, by name."""
    from peft.utils import ModulesToSaveWrapper

    return [(name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]


def add_adapter(model: PreTrainedModel, start: StartAdapter) -> Adapter:
    """Give a model its adapter.

    Args:
        model: as its files have it; changed in place.
        start: which adapter.

    Raises:
        ModelError: it cannot be read, or does not fit.
    """
    config = peft_config(start.lora)
    inject(model, config, seed=start.seed)
    if next(model.parameters()).is_meta:
        return Adapter(settings_of(model), {})
    taken: dict[str, Tensor] = {}
    if moves_base(config.init_lora_weights):
        if start.taken is None:
            with _seeded(model, start.seed):
                for _, layer in adapted_layers(model):
                    layer.pissa_init(ADAPTER, config.init_lora_weights)
        else:
            _take_again(model, start.taken)
        taken = {name: factor.detach().cpu().clone() for name, factor in _factors(model).items()}
    name = start.lora.adapter_name_or_path
    if name is not None:
        _check_shapes(start.lora, model)
        folder = adapter_folder(name, start.lora.adapter_revision, _KEY)
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, read_weights(folder), ADAPTER)
    return Adapter(settings_of(model), taken)


def _factors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every layer, by the names of the parameters."""
    return {
        f"{name}.{kind}.{ADAPTER}.weight": getattr(layer, kind)[ADAPTER].weight
        for name, layer in adapted_layers(model)
        for kind in ("lora_A", "lora_B")
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """The shape of one of several tensors; None where it is none of them."""
    return tuple(tensors[name].shape) if name in tensors else None


@torch.no_grad()
def _take_again(model: PreTrainedModel, taken: Mapping[str, Tensor]) -> None:
    """Take out of the base what a run's start took: as PEFT's `pissa_init`, to the same bits."""
    own = _factors(model)
    if other := [n for n in {**own, **taken} if _shape(own, n) != _shape(taken, n)]:
        raise ModelError(
            f"the checkpoint's adapter began with other layers than this model has ({other[0]}); "
            "give the model and the adapter that the run was started with"
        )
    for name, value in taken.items():
        own[name].copy_(value)
    for _, layer in adapted_layers(model):
        weight, a, b = layer.get_base_layer().weight, layer.lora_A, layer.lora_B
        turned = weight.float().T if layer.fan_in_fan_out else weight.float()
        rest = turned - layer.scaling[ADAPTER] * b[ADAPTER].weight @ a[ADAPTER].weight
        rest = rest.to(weight.dtype)
        weight.data = rest.T if layer.fan_in_fan_out else rest


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What the product of a model's adapter depends on besides numbers; empty without one."""
    config = getattr(model, "peft_config", {}).get(ADAPTER)
    if config is None:
        return {}
    keys = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    return {key: getattr(config, key) for key in keys}
