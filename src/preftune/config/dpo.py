"""Which loss, with which knobs."""

from dataclasses import dataclass, fields
from typing import Literal

from preftune.config.problem import Problem, below, count
from preftune.config.section import Section
from preftune.config.stage import StageChoice
from preftune.losses.knobs import KNOBS, LossKnobs, MeanOver
from preftune.losses.spec import LOSS_SPECS, DPOLossType
from preftune.schema import RowKind

Layout = Literal["shared_prefix", "concatenated", "separate"]
ForwardLayout = Literal["auto", "shared_prefix", "concatenated", "separate"]
_SYNC_DEFAULTS = {"reference_mixup_alpha": 0.6, "reference_sync_steps": 512}
PACKED_ONLY = ("varlen", "flex")
"""Values of `attn_implementation` that padded pairs cannot have."""


ONLY_WITH_PAIRS = (
    "loss_type",
    "loss_weights",
    "sft_weight",
    "sft_reduction",
    "ld_alpha",
    *KNOBS,
    "reference_model_name_or_path",
    "reference_model_revision",
    "sync_reference",
    "reference_mixup_alpha",
    "reference_sync_steps",
    "concatenated_forward",
)
"""What stage dpo alone reads of this section."""


def layout_problems(wanted_layout: ForwardLayout, attn_implementation: str) -> list[Problem]:
    """The problem of a layout with an attention kernel that has no form for it."""
    if wanted_layout == "shared_prefix" and attn_implementation == "eager":
        message = (
            "attn_implementation eager has no packed form: take auto or sdpa, or another "
            "forward_layout"
        )
        return [Problem("forward_layout", wanted_layout, message, ("attn_implementation",))]
    if wanted_layout in ("concatenated", "separate") and attn_implementation in PACKED_ONLY:
        message = f"it is a kernel of packed rows, and the layout is {wanted_layout}: take auto"
        others = ("forward_layout", "concatenated_forward")
        return [Problem("attn_implementation", attn_implementation, message, others)]
    return []


def stage_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of settings that a stage without pairs does not read."""
    found = []
    defaults = {field.name: field.default for field in fields(DPOConfig)}
    for key in ONLY_WITH_PAIRS:
        if (value := getattr(config, key)) != defaults[key]:
            message = f"stage {config.stage} does not read it, only dpo does: leave it out"
            found.append(Problem(key, value, message, ("stage",)))
    if config.forward_layout == "separate":
        message = f"stage {config.stage} has one answer a row, so there are no sides to part: take "
        message += "auto or concatenated"
        found.append(Problem("forward_layout", "separate", message, ("stage",)))
    return found


def fill_knobs(config: "DPOConfig") -> None:
    """Give knobs that are unset the default of the losses, where these have one in common."""
    given, defaults = dict(vars(config)), {}
    for loss in config.loss_types:
        spec = LOSS_SPECS.get(loss)  # None only while a wrong name awaits its report
        for name, default in spec.applying(given).items() if spec else ():
            defaults.setdefault(name, set()).add(default)
    for name, values in defaults.items():
        if getattr(config, name) is None and len(values) == 1:
            setattr(config, name, values.pop())


def knob_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of the losses' knobs: read by none of them, or out of their range."""
    found = []
    specs = {loss: LOSS_SPECS[loss] for loss in config.loss_types}
    for name in KNOBS:
        value = getattr(config, name)
        if value is None:
            continue
        readers = [spec for spec in specs.values() if name in spec.applying(vars(config))]
        bad = [spec.knob(name) for spec in readers if spec.knob(name).problem(value)]
        if not readers:
            said = [f"the loss {loss.value} {spec.refusal(name)}" for loss, spec in specs.items()]
            found.append(Problem(name, value, "; ".join(said), ("loss_type",)))
        elif bad:
            found.append(Problem(name, value, f"it must be {bad[0].range}"))
    return found


def sync_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of a reference that follows the policy."""
    alpha, steps = config.reference_mixup_alpha, config.reference_sync_steps
    settings = {"reference_mixup_alpha": alpha, "reference_sync_steps": steps}
    if not config.sync_reference:
        message = "the reference stays as it is: set sync_reference true, or leave it out"
        return [
            Problem(key, value, message, ("sync_reference",))
            for key, value in settings.items()
            if value is not None
        ]
    found = count("reference_sync_steps", steps)
    if alpha is not None and not 0 < alpha <= 1:
        found.append(Problem("reference_mixup_alpha", alpha, "it must be above 0 and at most 1"))
    if not config.needs_reference:
        named = ", ".join(loss.value for loss in config.loss_types)
        message = f"no reference is read by the loss {named}: leave it out"
        found.append(Problem("sync_reference", True, message, ("loss_type",)))
    return found


def reference_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of a reference that is another model."""
    key, name = "reference_model_name_or_path", config.reference_model_name_or_path
    if name is None:
        revision = config.reference_model_revision
        message = f"it needs {key}; the policy's own is model_revision"
        problem = Problem("reference_model_revision", revision, message, (key,))
        return [] if revision is None else [problem]
    if config.sync_reference:
        message = "sync_reference is true: that reference begins as the policy; leave one out"
        return [Problem(key, name, message, ("sync_reference",))]
    if not config.needs_reference:
        named = ", ".join(loss.value for loss in config.loss_types)
        message = f"no reference is read by the loss {named}: leave it out"
        return [Problem(key, name, message, ("loss_type",))]
    return []


def weight_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of what losses are summed, and how."""
    found, losses, weights = [], config.loss_types, config.loss_weights
    if not losses or len(set(losses)) != len(losses):
        shown = [loss.value for loss in losses]
        found.append(Problem("loss_type", shown, "it must name at least one loss, each once"))
    if weights is not None and len(weights) != len(losses):
        message = f"loss_type names {len(losses)} losses; give one weight for each"
        found.append(Problem("loss_weights", weights, message, ("loss_type",)))
    elif weights is not None and min(weights, default=1.0) <= 0:
        found.append(Problem("loss_weights", weights, "each must be above 0"))
    unpaired = [loss.value for loss in losses if loss in LOSS_SPECS and LOSS_SPECS[loss].unpaired]
    if unpaired and len(losses) > 1:
        shown = [loss.value for loss in losses]
        message = f"{unpaired[0]} trains on single completions and adds up with no other loss"
        found.append(Problem("loss_type", shown, message))
    elif unpaired and (weights is not None or config.sft_weight > 0):
        key, value = ("loss_weights", weights) if weights else ("sft_weight", config.sft_weight)
        message = f"the loss {unpaired[0]} trains on single completions and does not read it"
        found.append(Problem(key, value, message, ("loss_type",)))
    for key in ("sft_weight", "load_balancing_weight"):
        found += below(key, getattr(config, key), 0, "it must be at least 0")
    if config.sft_weight == 0 and config.sft_reduction is not None:
        message = "sft_weight is 0 (off), so nothing reads it; set sft_weight, or leave it unset"
        found.append(Problem("sft_reduction", config.sft_reduction, message, ("sft_weight",)))
    return found


def length_problems(config: "DPOConfig") -> list[Problem]:
    """The problems of what takes the length of answers out of the log-probs."""
    alpha = config.ld_alpha
    if not 0 <= alpha <= 1:
        return [Problem("ld_alpha", alpha, "it must be at least 0 and at most 1")]
    specs = {loss: LOSS_SPECS[loss] for loss in config.loss_types if loss in LOSS_SPECS}
    for loss, spec in specs.items():
        if alpha < 1 and (spec.unpaired or not spec.needs_reference):
            why = "trains on single completions" if spec.unpaired else "reads no reference"
            message = f"the loss {loss.value} {why} and does not read it; leave it at 1 (off)"
            return [Problem("ld_alpha", alpha, message, ("loss_type",))]
    return []


@dataclass(kw_only=True)
class LossChoice:
    """The loss, ahead of its knobs."""

    loss_type: DPOLossType | list[DPOLossType] | None = None
    """The loss of stage dpo, or a list of losses to sum, which share the knobs that are given.
    docs/losses.md has each one's formula, source, settings and curves. Unset: dpo."""

    loss_weights: list[float] | None = None
    """One weight above 0 for each loss of `loss_type`. Unset: 1 each."""

    sft_weight: float = 0.0
    """Weight of the chosen answer's negative log-likelihood, a mean over its tokens, beside the
    loss; 0 (off) or more."""

    sft_reduction: MeanOver | None = None
    """What that mean is over. sequence: the tokens of each answer first, then the pairs, each
    counting the same; token: all chosen tokens of the global batch. Unset: sequence."""

    ld_alpha: float = 1.0
    """Weight of an answer's tokens beyond the length of the pair's shorter answer, in the log-probs
    of policy and reference: 1 (off) down to 0 (they do not count). LD-DPO, against a drift towards
    long answers; for losses on pairs that read the reference."""


@dataclass(kw_only=True)
class DPOConfig(LossKnobs, LossChoice, StageChoice, Section):
    """The loss. A knob left unset takes the default of the chosen loss."""

    load_balancing_weight: float = 0.0
    """Weight of a loss beside the others that spreads tokens evenly over the experts of a mixture;
    0 (off) or more. Only for models with routers. Computed in each forward by itself, on its real
    tokens, so it depends on which pairs share one."""

    reference_model_name_or_path: str | None = None
    """The reference, where it is not the policy before its first step: a name on the Hugging Face
    Hub, a folder or a GGUF file, whose tokens must be those of the policy. Unset: the policy."""

    reference_model_revision: str | None = None
    """Branch, tag or commit of `reference_model_name_or_path` on the Hub. Unset: its default
    branch."""

    sync_reference: bool = False
    """Let the reference follow the policy (TR-DPO). It then runs beside the policy, a copy in
    memory, and its log-probs are not stored."""

    reference_mixup_alpha: float | None = None
    """The policy's share in the new reference at a sync, above 0, at most 1 (the policy itself).
    Unset: 0.6 with `sync_reference`."""

    reference_sync_steps: int | None = None
    """Optimizer steps from one sync of the reference to the next, 1 or more. Unset: 512 with
    `sync_reference`."""

    forward_layout: ForwardLayout = "auto"
    """How pairs go through the model. shared_prefix: one packed row without padding, each prompt
    once; concatenated: chosen and rejected as padded rows of one forward; separate: one side after
    the other, less memory. auto: shared_prefix where the model follows it, else concatenated."""

    concatenated_forward: bool | None = None
    """Another name for `forward_layout`: true is concatenated, false is separate. Unset: what
    `forward_layout` says."""

    def __post_init__(self) -> None:
        """Fill the knobs of the chosen loss; where several differ, each keeps its own default."""
        if self.stage != "dpo":
            return  # there is no loss to choose
        if self.loss_type is None:
            self.loss_type = DPOLossType.DPO
        if isinstance(self.loss_type, list) and len(self.loss_type) == 1:
            self.loss_type = self.loss_type[0]
        fill_knobs(self)
        if self.sync_reference:
            for name, default in _SYNC_DEFAULTS.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)

    @property
    def loss_types(self) -> list[DPOLossType]:
        """The losses that are summed; none but in stage dpo."""
        if self.loss_type is None or isinstance(self.loss_type, list):
            return self.loss_type or []
        return [self.loss_type]

    @property
    def wanted_layout(self) -> ForwardLayout:
        """What `forward_layout` and `concatenated_forward` ask for together."""
        if self.forward_layout != "auto" or self.concatenated_forward is None:
            return self.forward_layout
        return "concatenated" if self.concatenated_forward else "separate"

    @property
    def reads_margin(self) -> bool:
        """Whether a loss reads the margins of the data."""
        return any(LOSS_SPECS[loss].reads_margin for loss in self.loss_types)

    @property
    def reads_mismatched(self) -> bool:
        """Whether the loss reads another row's answer behind each prompt."""
        return any(LOSS_SPECS[loss].reads_mismatched for loss in self.loss_types)

    @property
    def reads_mean_length(self) -> bool:
        """Whether the loss takes a mean over all chosen tokens of the global batch."""
        return "token" in (self.sft_reduction, self.cpo_nll)

    @property
    def scores_prompt(self) -> bool:
        """Whether the loss reads the log-probs of the prompts, too."""
        return self.orpo_nll == "sequence"

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probs."""
        return any(LOSS_SPECS[loss].needs_reference for loss in self.loss_types)

    @property
    def stores_reference(self) -> bool:
        """Whether the reference's log-probs are computed once, before the first step, and kept."""
        return self.needs_reference and not self.sync_reference

    @property
    def unpaired(self) -> bool:
        """Whether a loss trains on single labelled answers: then pairs are taken apart."""
        return any(LOSS_SPECS[loss].unpaired for loss in self.loss_types)

    @property
    def row_kind(self) -> RowKind:
        """What the rows of the data are read as."""
        if self.stage == "sft":
            return "supervised"
        return "labelled" if self.unpaired else "pairs"

    def knobs_of(self, loss: DPOLossType) -> dict[str, float | str]:
        """The knobs of one of the losses: those given, and its defaults.

        Args:
            loss: one of `loss_types`.
        """
        given = {name: value for name in KNOBS if (value := getattr(self, name)) is not None}
        applying = LOSS_SPECS[loss].applying(given)
        return {name: given.get(name, default) for name, default in applying.items()}

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        if self.stage != "dpo":
            return stage_problems(self)
        found = [*weight_problems(self), *length_problems(self), *knob_problems(self)]
        found += [*sync_problems(self), *reference_problems(self)]
        if self.concatenated_forward is not None and self.forward_layout != "auto":
            said = "concatenated" if self.concatenated_forward else "separate"
            if said != self.forward_layout:
                message = f"it means the layout {said}, but forward_layout is {self.forward_layout}"
                key, value = "concatenated_forward", self.concatenated_forward
                found.append(Problem(key, value, f"{message}; give one", ("forward_layout",)))
        return found
