"""Every setting of a loss, once: type, range and text, for config, help, schema and docs.

A loss says in `spec` which of them it reads, and their defaults.
"""

import math
import sys
from dataclasses import dataclass, fields
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

FDivergence: TypeAlias = Literal["reverse_kl", "forward_kl", "js", "alpha"]
SumOrMean: TypeAlias = Literal["sum", "mean"]
MeanOver: TypeAlias = Literal["sequence", "token"]
"""A mean over each answer first, then over pairs; or over all tokens of the global batch."""
CPONll: TypeAlias = Literal["sum", "mean", "token"]
ORPONll: TypeAlias = Literal["answer", "sequence"]
WPOAlignment: TypeAlias = Literal["sampled", "none"]
WPOCap: TypeAlias = Literal["one", "none"]


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    """Whether `low` itself is outside the range."""
    high_open: bool = False
    """Whether `high` itself is outside the range."""


@dataclass(frozen=True)
class OnlyWith:
    """A setting that is read only where another one has one value."""

    name: str
    value: str


@dataclass(kw_only=True)
class LossKnobs:
    """The knobs of all losses, unset; config inherits these fields and their docstrings."""

    beta: Annotated[float | None, Range(low=0.0, low_open=True)] = None
    """Strength of the pull towards the reference, above 0, per nat, or per nat a token for losses
    that divide by length (simpo, cpo: scale of the reward; orpo: weight of the odds ratio)."""

    label_smoothing: Annotated[float | None, Range(low=0.0, high=0.5, high_open=True)] = None
    """Assumed share of pairs whose labels are swapped, 0 (off) to below 0.5. exo_pair aims at it
    as the probability of the rejected answer, and needs it above 0."""

    f_divergence: FDivergence | None = None
    """The divergence from the reference that is held small: reverse_kl (plain DPO), forward_kl, js
    or alpha."""

    f_divergence_alpha: Annotated[
        float | None,
        Range(low=0.0, high=1.0, low_open=True, high_open=True),
        OnlyWith("f_divergence", "alpha"),
    ] = None
    """Order of the alpha divergence, between 0 (towards reverse_kl) and 1 (towards forward_kl)."""

    gamma_beta_ratio: Annotated[float | None, Range(low=0.0)] = None
    """Target margin between mean log-probs, in nats a token, before beta scales it; 0 (off) or
    more."""

    wpo_alignment: WPOAlignment | None = None
    """How a pair's weight is made comparable between tokens. sampled: each token's probability is
    divided by the one expected of a sampled token; none: it is taken as it is."""

    wpo_cap: WPOCap | None = None
    """The most that a pair may weigh: one, as in the authors' code, or none, as in TRL."""

    ipo_log_ratios: SumOrMean | None = None
    """Log-ratio of a completion: sum over its tokens, as in the paper's formula, or mean, as in
    TRL."""

    dpop_lambda: Annotated[float | None, Range(low=0.0)] = None
    """Weight of the penalty on a chosen answer that is less likely than under the reference; 0 is
    plain DPO."""

    discopop_tau: Annotated[float | None, Range(low=0.0, high=1.0, low_open=True)] = None
    """Temperature of the blend of the logistic and the exponential loss, above 0, at most 1."""

    cpo_alpha: Annotated[float | None, Range(low=0.0)] = None
    """Weight of the chosen answer's negative log-likelihood beside the preference term, 0 (off) or
    more."""

    cpo_nll: CPONll | None = None
    """The chosen answer's negative log-likelihood: sum over its tokens, as the paper's formula;
    mean over its tokens; or token, the mean over all chosen tokens of the global batch, which the
    authors' code and TRL take of each micro-batch."""

    orpo_nll: ORPONll | None = None
    """What the fine-tuning term's mean negative log-likelihood is of: the chosen answer, as in the
    paper's formula, or the sequence of prompt and chosen answer, as in the authors' code and
    TRL."""

    odpo_alpha: Annotated[float | None, Range(low=0.0)] = None
    """Factor of each pair's margin, 0 (plain DPO) or more."""

    beta_dpo_alpha: Annotated[float | None, Range(low=0.0)] = None
    """How strongly beta follows a batch's mean margin, per nat, 0 (plain DPO) or more."""

    beta_dpo_momentum: Annotated[float | None, Range(low=0.0, high=1.0, high_open=True)] = None
    """Share of the running mean margin that a batch leaves, 0 to below 1."""

    desirable_weight: Annotated[float | None, Range(low=0.0, low_open=True)] = None
    """How much a desirable completion counts in kto, above 0."""

    undesirable_weight: Annotated[float | None, Range(low=0.0, low_open=True)] = None
    """How much an undesirable completion counts in kto, above 0."""

    bco_momentum: Annotated[float | None, Range(low=0.0, high=1.0, high_open=True)] = None
    """Share of the running mean rewards that a batch leaves, 0 to below 1."""


@dataclass(frozen=True)
class Knob:
    """One setting of a loss and what it may be."""

    name: str
    numbers: Range = Range()
    choices: tuple[str, ...] = ()
    """The words a knob takes that is no number; empty for numbers."""
    only_with: OnlyWith | None = None

    @property
    def range(self) -> str:
        """The legal values in words, to follow "must be"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        numbers, bounds = self.numbers, []
        if math.isfinite(numbers.low):
            bounds.append(f"{'above' if numbers.low_open else 'at least'} {numbers.low:g}")
        if math.isfinite(numbers.high):
            bounds.append(f"{'below' if numbers.high_open else 'at most'} {numbers.high:g}")
        return " ".join(["a finite number", " and ".join(bounds)]).strip()

    def problem(self, value: object) -> str | None:
        """Say what is wrong with a value.

        Args:
            value: anything; a bool or a number written as text is no number.

        Returns:
            Such as "beta is 0; it must be a finite number above 0"; None if the value is legal.
        """
        if self.choices:
            legal = isinstance(value, str) and value in self.choices
        else:
            legal = self._is_number_in_range(value)
        return None if legal else f"{self.name} is {value!r}; it must be {self.range}"

    def _is_number_in_range(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        numbers = self.numbers
        # Not isfinite, which raises on an int too large for a float.
        finite = abs(value) <= sys.float_info.max
        above = value > numbers.low if numbers.low_open else value >= numbers.low
        below = value < numbers.high if numbers.high_open else value <= numbers.high
        return finite and above and below


def _knob(name: str, hint: Any) -> Knob:
    extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    kinds = get_args(get_args(hint)[0] if extras else hint)
    words = next((kind for kind in kinds if kind not in (float, NoneType)), None)
    return Knob(
        name,
        next((extra for extra in extras if isinstance(extra, Range)), Range()),
        get_args(words) if words else (),
        next((extra for extra in extras if isinstance(extra, OnlyWith)), None),
    )


_HINTS = get_type_hints(LossKnobs, include_extras=True)
KNOBS: dict[str, Knob] = {
    field.name: _knob(field.name, _HINTS[field.name]) for field in fields(LossKnobs)
}
"""Each knob once, whichever losses read it."""
