"""Which model, and how its weights and attention run."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from preftune.config.problem import Problem
from preftune.config.section import Section

CHAT_TEMPLATES = ("alpaca", "chatml", "llama3", "plain", "tulu", "zephyr")
"""Names of the chat templates that come with preftune."""


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

    chat_template: str | None = None
    """How messages become text: alpaca, chatml, llama3, plain, tulu, zephyr, the path of a .jinja
    file, or the folder or Hub id of a tokenizer whose template is taken. Unset: the tokenizer's
    own."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """How weights are stored; how products are computed is `mixed_precision`. bfloat16 weights
    need half the memory, and AdamW loses small updates on them."""

    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """The attention kernel. auto: the best that the device and the model support."""

    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""

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
        template = self.chat_template
        named = template and ("/" in template or template.endswith(".jinja"))
        if template is not None and not named and template not in CHAT_TEMPLATES:
            near = get_close_matches(template, CHAT_TEMPLATES, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            message = (
                f"it must be {', '.join(CHAT_TEMPLATES)}, the path of a .jinja file, or the folder "
                f"(./name) or Hub id (owner/name) of a tokenizer{hint}"
            )
            found.append(Problem("chat_template", template, message))
        return found
