"""The configuration of `preftune score`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from preftune.config.composed import ComposedConfig
from preftune.config.dataset import PairsConfig
from preftune.config.dpo import ForwardLayout, layout_problems
from preftune.config.logging import Progress
from preftune.config.model import ModelConfig, gguf_problems
from preftune.config.problem import Problem, count
from preftune.config.section import Section
from preftune.config.training import MixedPrecision, precision_problems

DEFAULT_BETA = 0.1
"""Scale of implicit rewards where none is given: that of the dpo loss."""


@dataclass(kw_only=True)
class ScoringConfig(Section):
    """What to compute, and where to write it."""

    other_models: list[str] | None = None
    """More models to score on the same pairs, loaded one after the other: names on the Hugging Face
    Hub or folders, also such of adapters, whose files name their base. All have the tokens of
    `model_name_or_path`. Unset: that one alone."""

    reference_model_name_or_path: list[str] | None = None
    """The model that implicit rewards are measured against; of several, each model against each.
    Unset: no implicit rewards, only how often the chosen answer is the likelier one."""

    beta: float | None = None
    """Scale of the implicit rewards, above 0; only with a reference model. Unset: 0.1."""

    kl_samples: int | None = None
    """Sample this many answers from each model, at temperature 1, to prompts of the data, and
    estimate from them how far it is from the reference: the KL divergence in nats an answer, 2
    samples or more. Models that are references get none. Unset: no estimate."""

    kl_max_new_tokens: int | None = None
    """Most tokens of a sampled answer, 1 or more; the estimate is that of answers cut there.
    Unset: 256."""

    per_device_eval_batch_size: int | None = None
    """Most pairs in one forward on one device, 1 or more. Unset: 8, or any number where
    `max_tokens_per_microbatch` is given."""

    max_tokens_per_microbatch: int | None = None
    """Most tokens in one forward on one device, 2 or more, padding included; a longer pair goes
    alone. Unset: only the number of pairs bounds a forward."""

    mixed_precision: MixedPrecision = "auto"
    """How products are computed. auto: bf16 where the device has it in hardware; else fp16 on GPUs
    and fp32 on CPUs; "no" is another word for fp32."""

    forward_layout: ForwardLayout = "auto"
    """How pairs go through the model. shared_prefix: one packed row without padding, each prompt
    once; concatenated: chosen and rejected as padded rows of one forward; separate: one side after
    the other, less memory. auto: shared_prefix where the model follows it, else concatenated."""

    output: str | None = None
    """A .parquet file for the scores of every pair. Unset: only the summary."""

    summary: str | None = None
    """A .json file for what is printed, with all digits and all sources. Unset: it is printed
    only."""

    lists: str | None = None
    """A .jsonl file for three lists of pairs: likely mislabelled (all models rank the answers
    against the label, and clearly so), too hard (not ranked right by the models), already learnt
    (ranked right with a probability of 0.9 or more). Ranked by implicit rewards; without reference
    by mean log-probs a token. Unset: no lists."""

    list_size: int | None = None
    """Most pairs of a list, 1 or more. Unset: 100."""

    progress: Progress = "auto"
    """What the terminal shows. rich: a live bar; plain: lines; none: nothing; auto: rich in a
    terminal, else plain."""

    def __post_init__(self) -> None:
        """Fill beta where rewards are computed, and the batch size where nothing bounds it."""
        if self.per_device_eval_batch_size is None and self.max_tokens_per_microbatch is None:
            self.per_device_eval_batch_size = 8
        if self.beta is None and self.reference_model_name_or_path is not None:
            self.beta = DEFAULT_BETA
        if self.kl_max_new_tokens is None and self.kl_samples is not None:
            self.kl_max_new_tokens = 256
        if self.list_size is None and self.lists is not None:
            self.list_size = 100

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("per_device_eval_batch_size", self.per_device_eval_batch_size)
        found += count("max_tokens_per_microbatch", self.max_tokens_per_microbatch, least=2)
        if self.beta is not None and self.reference_model_name_or_path is None:
            message = "without reference_model_name_or_path there are no rewards to scale"
            found.append(Problem("beta", self.beta, message, ("reference_model_name_or_path",)))
        elif self.beta is not None and self.beta <= 0:
            found.append(Problem("beta", self.beta, "it must be above 0"))
        found += count("kl_samples", self.kl_samples, least=2)
        found += count("kl_max_new_tokens", self.kl_max_new_tokens)
        if self.kl_samples is not None and self.reference_model_name_or_path is None:
            message = "without reference_model_name_or_path there is nothing to be far from"
            others = ("reference_model_name_or_path",)
            found.append(Problem("kl_samples", self.kl_samples, message, others))
        if self.kl_max_new_tokens is not None and self.kl_samples is None:
            message = "without kl_samples nothing is sampled"
            found.append(
                Problem("kl_max_new_tokens", self.kl_max_new_tokens, message, ("kl_samples",))
            )
        found += count("list_size", self.list_size)
        if self.list_size is not None and self.lists is None:
            message = "without lists there is nothing to cut"
            found.append(Problem("list_size", self.list_size, message, ("lists",)))
        return found + _names_problems(self)


def _names_problems(section: ScoringConfig) -> list[Problem]:
    """Of files with other endings, and of models that are named twice, or not at all."""
    found = []
    for key, ending in (("output", ".parquet"), ("summary", ".json"), ("lists", ".jsonl")):
        name = getattr(section, key)
        if name is not None and not name.endswith(ending):
            found.append(Problem(key, name, f"it must be the path of a {ending} file"))
    for key in ("other_models", "reference_model_name_or_path"):
        names = getattr(section, key)
        if names == []:
            found.append(Problem(key, names, "it must name a model, or be left out"))
        if len(set(map(_place, names or ()))) < len(names or ()):
            found.append(Problem(key, names, "it names a model twice: leave one out"))
    return found


def _place(name: str) -> PurePath:
    """One for a folder however it is written, as ./a or as a/."""
    return PurePath(name)


def short_labels(names: Sequence[str]) -> dict[str, str]:
    """A label for each model: the least of its path's end that is its own.

    `final`, the folder of every run's model, says nothing, so the run's name comes with it.

    Args:
        names: of different places.
    """
    parts = {name: _place(name).parts or (name,) for name in names}
    labels = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        tails = [own[-depth:] for depth in range(1, len(own) + 1)]
        telling = [tail for tail in tails if tail != ("final",)]
        telling = [t for t in telling if all(other[-len(t) :] != t for other in others)]
        labels[name] = str(PurePath(*(telling or [own])[0]))
    return labels


@dataclass(kw_only=True)
class ScoreConfig(ComposedConfig, ScoringConfig, ModelConfig, PairsConfig):
    """Everything scoring needs, flat."""

    @property
    def models_to_score(self) -> list[tuple[str, str, str]]:
        """Each model once, references among them: its name, its label, the option that named it."""
        named = [(str(self.model_name_or_path), "model_name_or_path")]
        named += [(name, "other_models") for name in self.other_models or ()]
        named += [
            (name, "reference_model_name_or_path")
            for name in self.reference_model_name_or_path or ()
        ]
        once: dict[PurePath, tuple[str, str]] = {}
        for name, key in named:
            once.setdefault(_place(name), (name, key))
        labels = short_labels([name for name, _ in once.values()])
        return [(name, labels[name], key) for name, key in once.values()]

    @property
    def model_labels(self) -> list[str]:
        """Of `model_name_or_path` and `other_models`."""
        keys = ("model_name_or_path", "other_models")
        return [label for _, label, key in self.models_to_score if key in keys]

    @property
    def reference_labels(self) -> list[str]:
        """Of the references."""
        labels = {_place(name): label for name, label, _ in self.models_to_score}
        return [labels[_place(name)] for name in self.reference_model_name_or_path or ()]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Labels of each model and each reference that is another."""
        references = self.reference_labels
        return [(m, r) for r in references for m in self.model_labels if m != r]

    def cross_problems(self) -> list[Problem]:
        """Settings that contradict each other, or that only training reads."""
        message = "scoring trains nothing, so it has no effect: leave it out"
        found = layout_problems(self.forward_layout, self.attn_implementation)
        found += precision_problems(self.dtype, self.mixed_precision)
        if self.model_name_or_path is not None:
            found += self._model_problems()
        if self.gradient_checkpointing:
            found.append(Problem("gradient_checkpointing", True, message))
        if not self.disable_dropout:
            found.append(Problem("disable_dropout", False, message))
        return found

    def _model_problems(self) -> list[Problem]:
        key = "reference_model_name_or_path"
        found = []
        if _place(str(self.model_name_or_path)) in map(_place, self.other_models or ()):
            message = "model_name_or_path is among them: leave it out here"
            found.append(Problem("other_models", self.other_models, message))
        for names_key in ("other_models", key):
            for name in getattr(self, names_key) or ():
                found += gguf_problems(self, names_key, name)
        if self.reference_labels and not self.comparisons:
            message = "it is the model itself, so that every reward would be 0: give another"
            found.append(Problem(key, self.reference_model_name_or_path, message))
        return found
