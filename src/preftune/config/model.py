"""Which model, and how its weights and attention run."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from preftune.config.problem import Problem
from preftune.config.section import Section

CHAT_TEMPLATES = ("chatml", "tulu", "zephyr", "llama3", "alpaca", "plain")
"""Names of the chat templates that come with preftune."""

AttentionName = Literal["auto", "eager", "sdpa", "flash_attention_2", "varlen", "flex"]


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
        if self.use_cache and self.gradient_checkpointing:
            kind = str(self.gradient_checkpointing).lower()
            message = f"gradient_checkpointing is {kind}, and they exclude each other: leave it out"
            found.append(Problem("use_cache", True, message, ("gradient_checkpointing",)))
        if self.activation_offload and self.gradient_checkpointing is not True:
            message = "it moves the inputs of layers that compute the rest again: set "
            message += "gradient_checkpointing to true, or leave it out"
            found.append(Problem("activation_offload", True, message, ("gradient_checkpointing",)))
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
    )


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
