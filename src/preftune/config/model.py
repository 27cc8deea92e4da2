"""Which model, and how its weights and attention run."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from preftune.config.problem import Problem
from preftune.config.section import Section

CHAT_TEMPLATES = ("chatml", "tulu", "zephyr", "llama3", "alpaca", "plain")
"""Names of the chat templates that come with preftune."""

AttentionName = Literal["auto", "eager", "sdpa", "flash_attention_2", "varlen", "flex"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]

QUANTIZATION = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)
"""The options that say how a model is quantised."""
_OF_4BIT = {
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "auto",
}


@dataclass(kw_only=True)
class ModelConfig(Section):
    """The policy: model, tokenizer and how they are loaded."""

    model_name_or_path: str | None = None
    """The model to start from: a name on the Hugging Face Hub, a folder or a GGUF file.
    Required."""

    model_revision: str | None = None
    """Branch, tag or commit on the Hub. Unset: the repository's default branch."""

    tokenizer_name_or_path: str | None = None
    """The tokenizer: a name on the Hub or a folder. Unset: the model's own."""

    tokenizer_revision: str | None = None
    """Branch, tag or commit of `tokenizer_name_or_path` on the Hub. Unset: its default branch."""

    chat_template: str | None = None
    """How messages become text: chatml, tulu, zephyr, llama3, alpaca or plain; the path of a .jinja
    file; a folder (./name) or Hub id (org/name), whose tokenizer's template is taken. Unset: the
    tokenizer's own."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are stored; how products are computed is `mixed_precision`. bfloat16 weights
    need half the memory, and AdamW loses small updates on them."""

    attn_implementation: AttentionName = "auto"
    """The attention kernel. sdpa: PyTorch's scaled_dot_product_attention, answer by answer;
    flash_attention_2 (the package flash-attn), varlen and flex (PyTorch's own): one call for a
    packed row, on GPUs; eager: written out, for padded pairs. auto: on a GPU the fastest of those
    that are right for the model, measured at the start; on a CPU sdpa."""

    gradient_checkpointing: bool | Literal["selective"] = False
    """Compute activations again in the backward pass. true: all but the input of each layer: least
    memory, about a third more time; selective: all but the results of matrix products and
    attention: less than half of the memory, about a twentieth more time."""

    activation_offload: bool = False
    """Keep the inputs of layers in the host's memory between forward and backward, on GPUs. Needs
    `gradient_checkpointing` true."""

    use_cache: bool = False
    """Let the model keep keys and values in its forward; training has no use for them and it costs
    memory. Not with `gradient_checkpointing`."""

    disable_dropout: bool = True
    """Set the model's own dropout to 0, so that policy and reference are the same function at
    the start. false: dropout as in the model's config."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model repository."""

    load_in_4bit: bool = False
    """Keep the weights of linear layers in 4 bits, and train adapters over them (QLoRA,
    arXiv:2305.14314); head, embeddings and norms stay in `dtype`. Needs `use_lora` in training, and
    the package bitsandbytes."""

    load_in_8bit: bool = False
    """The same in 8 bits, an integer a weight and a scale a row; products are computed from the
    weights that these stand for."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """The 16 values that 4 bits stand for. nf4: quantiles of a normal distribution; fp4: floating
    point. Unset: nf4."""

    bnb_4bit_use_double_quant: bool | None = None
    """Keep the scales of 64 weights in 8 bits, too: 4.13 bits a weight, not 4.5. Unset: true."""

    bnb_4bit_compute_dtype: ComputeDtype | None = None
    """The type that 4-bit weights are unpacked to, and multiplied in. auto: that of the run's
    products (`mixed_precision`). Unset: auto."""

    def __post_init__(self) -> None:
        """Fill how weights become 4 bits."""
        if self.load_in_4bit:
            for key, value in _OF_4BIT.items():
                if getattr(self, key) is None:
                    setattr(self, key, value)

    @property
    def is_quantized(self) -> bool:
        """Whether weights are kept in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def quantization_key(self) -> str:
        """The option that asked for quantised weights."""
        return "load_in_4bit" if self.load_in_4bit else "load_in_8bit"

    @property
    def quantization(self) -> dict[str, Any]:
        """How weights are quantised, as options; empty where they are not."""
        values = {key: getattr(self, key) for key in QUANTIZATION} if self.is_quantized else {}
        return {key: value for key, value in values.items() if value not in (None, False)}

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        if self.model_name_or_path is None:
            message = "it must name a model on the Hugging Face Hub, a folder or a GGUF file"
            found.append(Problem("model_name_or_path", None, message))
        if self.tokenizer_revision is not None and self.tokenizer_name_or_path is None:
            message = "it needs tokenizer_name_or_path; the model's own comes with model_revision"
            others = ("tokenizer_name_or_path",)
            found.append(Problem("tokenizer_revision", self.tokenizer_revision, message, others))
        found += _checkpointing_problems(self)
        found += _quantization_problems(self)
        return found + _template_problems(self.chat_template)


def another_model(config: ModelConfig, name: str, revision: str | None = None) -> ModelConfig:
    """Another model, loaded the same way.

    Args:
        config: how.
        name: which, as `model_name_or_path`.
        revision: of it, as `model_revision`.
    """
    return ModelConfig(
        model_name_or_path=name,
        model_revision=revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
        **{key: getattr(config, key) for key in QUANTIZATION},
    )


def gguf_problems(config: ModelConfig, key: str, name: str | None) -> list[Problem]:
    """Of a GGUF file that shall be quantised anew.

    Args:
        config: how it shall be loaded.
        key: the option that names the model.
        name: of the model.
    """
    if not (config.is_quantized and (name or "").endswith(".gguf")):
        return []
    bits = config.quantization_key
    message = (
        f"{bits} quantises weights as they are read, which transformers cannot do with a GGUF "
        "file: give the model as a folder with safetensors, or a name on the Hub"
    )
    return [Problem(key, name, message, (bits,))]


def _quantization_problems(config: ModelConfig) -> list[Problem]:
    found = gguf_problems(config, "model_name_or_path", config.model_name_or_path)
    if config.load_in_4bit and config.load_in_8bit:
        message = "load_in_4bit is true, and they exclude each other: leave one out"
        found.append(Problem("load_in_8bit", True, message, ("load_in_4bit",)))
    if not config.load_in_4bit:
        message = "load_in_4bit is false, so nothing reads it: leave it out, or set load_in_4bit"
        found += [
            Problem(key, getattr(config, key), f"{message} true", ("load_in_4bit",))
            for key in _OF_4BIT
            if getattr(config, key) is not None
        ]
    return found


def _checkpointing_problems(section: ModelConfig) -> list[Problem]:
    found, others = [], ("gradient_checkpointing",)
    if section.use_cache and section.gradient_checkpointing:
        kind = str(section.gradient_checkpointing).lower()
        message = f"gradient_checkpointing is {kind}, and they exclude each other: leave it out"
        found.append(Problem("use_cache", True, message, others))
    if section.activation_offload and section.gradient_checkpointing is not True:
        message = "it moves the inputs of layers that compute the rest again: set "
        message += "gradient_checkpointing to true, or leave it out"
        found.append(Problem("activation_offload", True, message, others))
    return found


def _template_problems(template: str | None) -> list[Problem]:
    if template is None or template in CHAT_TEMPLATES:
        return []
    if "/" in template or template.endswith(".jinja"):
        return []  # a file, folder or repository: whether it exists is not for here
    near = get_close_matches(template, CHAT_TEMPLATES, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    message = (
        f"it must be {', '.join(CHAT_TEMPLATES)}, the path of a .jinja file, a folder as ./name or "
        f"a Hub id as org/name{hint}"
    )
    return [Problem("chat_template", template, message)]
