"""Low-rank adapters: a few small matrices train, and the model's own weights stay."""

import re
from dataclasses import dataclass
from typing import Literal

from preftune.config.problem import Problem, count
from preftune.config.section import Section

ALL_LINEAR = "all-linear"
"""Every linear layer but the head."""

_INITS = re.compile(r"default|gaussian|pissa(_niter_[1-9]\d*)?")
_DEFAULTS = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": ALL_LINEAR,
    "lora_task_type": "CAUSAL_LM",
    "init_lora_weights": "default",
}
BROUGHT = (
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "lora_task_type",
    "modules_to_save",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
)
"""What an adapter's own files say."""


@dataclass(kw_only=True)
class LoRAConfig(Section):
    """Low-rank adapters (LoRA): beside a weight W of d_out x d_in train B (d_out x r) and A
    (r x d_in), and the layer multiplies by W + lora_alpha / r * B A. W itself stays."""

    use_lora: bool = False
    """Train adapters alone. false: all weights train."""

    lora_r: int | None = None
    """The rank r, 1 or more: a matrix trains r x (d_in + d_out) numbers. Unset: 16."""

    lora_alpha: int | None = None
    """The product B A counts lora_alpha / r times, 1 or more. Unset: 32."""

    lora_dropout: float | None = None
    """Share of an adapter's inputs that are dropped in training, from 0 to below 1;
    `disable_dropout` leaves it alone. Unset: 0, or that of `adapter_name_or_path`."""

    lora_target_modules: str | list[str] | None = None
    """Layers that get adapters. all-linear: every linear layer but the head; a list of names such
    as [q_proj, v_proj]: layers whose names end so; other text: a regular expression that matches
    the whole name. Unset: all-linear."""

    lora_task_type: Literal["CAUSAL_LM"] | None = None
    """What the adapter's files say it is for: CAUSAL_LM, the only task here."""

    modules_to_save: list[str] | None = None
    """Layers that train whole, beside the adapters, and are saved with them, by the ends of their
    names. Unset: none."""

    use_rslora: bool = False
    """Let the product count lora_alpha / sqrt(r) times instead (rsLoRA, arXiv:2312.03732)."""

    use_dora: bool = False
    """Also train the length of each row of a weight, and let the adapter turn it (DoRA,
    arXiv:2402.09353)."""

    init_lora_weights: str | None = None
    """How A and B begin. default: A random, B zero, so that the model begins as its base; gaussian:
    the same with normal numbers; pissa: the largest singular directions of W, which W gives up
    (arXiv:2404.02948), pissa_niter_16: the same, approximately and fast. Unset: default."""

    adapter_name_or_path: str | None = None
    """A LoRA adapter to go on training, such as that of an SFT: a folder or a name on the Hub, in
    PEFT's format. Its base is `model_name_or_path`, and the reference is the two together. Unset: a
    new adapter."""

    adapter_revision: str | None = None
    """Branch, tag or commit of `adapter_name_or_path` on the Hub. Unset: its default branch."""

    def __post_init__(self) -> None:
        """Fill what a new adapter is made from."""
        if self.use_lora and self.adapter_name_or_path is None:
            for key, value in _DEFAULTS.items():
                if getattr(self, key) is None:
                    setattr(self, key, value)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if not self.use_lora:
            return _unread_problems(self)
        found = count("lora_r", self.lora_r) + count("lora_alpha", self.lora_alpha)
        dropout, init = self.lora_dropout, self.init_lora_weights
        if dropout is not None and not 0 <= dropout < 1:
            found.append(Problem("lora_dropout", dropout, "it must be from 0 to below 1"))
        if init is not None and not _INITS.fullmatch(init):
            message = "it must be default, gaussian, pissa or pissa_niter_16 (any whole number)"
            found.append(Problem("init_lora_weights", init, message))
        for key in ("lora_target_modules", "modules_to_save"):
            if getattr(self, key) == []:
                found.append(Problem(key, [], "it must name a layer, or be left out"))
        return found + _start_problems(self)


def _unread_problems(section: LoRAConfig) -> list[Problem]:
    message = "use_lora is false, so nothing reads it: leave it out, or set use_lora true"
    keys = (*BROUGHT, "lora_dropout", "adapter_name_or_path", "adapter_revision")
    return [
        Problem(key, value, message, ("use_lora",))
        for key in keys
        if (value := getattr(section, key)) not in (None, False)
    ]


def _start_problems(section: LoRAConfig) -> list[Problem]:
    if section.adapter_name_or_path is None:
        if section.adapter_revision is None:
            return []
        message, others = "it needs adapter_name_or_path", ("adapter_name_or_path",)
        return [Problem("adapter_revision", section.adapter_revision, message, others)]
    message = "the adapter of adapter_name_or_path brings its own: leave it out"
    return [
        Problem(key, value, message, ("adapter_name_or_path",))
        for key in BROUGHT
        if (value := getattr(section, key)) not in (None, False)
    ]
