"""What each loss is called, reads and is set by: the table config, help and docs are made from.

No torch here: config and `--help` import this module. Every default of a loss is stated in this
file and nowhere else; the dataclasses in the loss files take theirs from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from preftune.losses.knobs import KNOBS, Knob, Range


class DPOLossType(StrEnum):
    """The losses, by the name that `loss_type` takes; each is in the file of its name."""

    DPO = "dpo"
    DPO_NORM = "dpo_norm"
    SIMPO = "simpo"
    WPO = "wpo"
    IPO = "ipo"
    HINGE = "hinge"
    ROBUST = "robust"
    EXO_PAIR = "exo_pair"
    NCA_PAIR = "nca_pair"
    BCO_PAIR = "bco_pair"
    SPPO_HARD = "sppo_hard"
    APO_ZERO = "apo_zero"
    APO_DOWN = "apo_down"
    DISCOPOP = "discopop"
    DPOP = "dpop"
    ORPO = "orpo"
    CPO = "cpo"
    ODPO = "odpo"
    AOT = "aot"
    AOT_UNPAIRED = "aot_unpaired"
    BETA_DPO = "beta_dpo"
    KTO = "kto"
    BCO = "bco"


@dataclass(frozen=True)
class LossSpec:
    """What config, the forward and the docs must know of a loss before torch is loaded."""

    class_name: str
    """Of the loss, in the file that bears its `loss_type`."""
    summary: str
    """One line for docs."""
    knobs: Mapping[str, Any]
    """The knobs this loss reads, with this loss's own defaults; it has no others."""
    needs_reference: bool = True
    """Whether it reads the reference's log-probs; where False, no reference forward runs."""
    reads_alignment: bool = False
    """Whether it can read `PairLogps.*_alignment`; the loss object says if, so set, it does."""
    reads_margin: bool = False
    """Whether it reads `PairLogps.margin`, the margin column of the data."""
    needs_global_batch: bool = False
    """Whether a pair's value depends on the others: it must see the global batch in one call."""
    unpaired: bool = False
    """Whether it trains on single labelled completions."""
    reads_mismatched: bool = False
    """Whether it reads the log-prob of another row's completion after each prompt."""
    narrower: Mapping[str, Knob] = field(default_factory=dict)
    """Knobs whose range is narrower here than elsewhere."""

    def knob(self, name: str) -> Knob:
        """A knob with the range that this loss allows."""
        return self.narrower.get(name, KNOBS[name])

    def applying(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The knobs that this loss reads beside those given, with its defaults.

        Args:
            given: knobs by name; None or absent is not given.
        """
        applying = {}
        for name, default in self.knobs.items():
            other = KNOBS[name].only_with
            chosen = other and (given.get(other.name) or self.knobs[other.name])
            if other is None or chosen == other.value:
                applying[name] = default
        return applying

    def refusal(self, name: str) -> str:
        """Why a knob that is given does not apply, to follow "the loss x "."""
        other = KNOBS[name].only_with
        if name in self.knobs and other is not None:
            return f"reads it only with {other.name} {other.value}"
        readers = ", ".join(loss for loss, spec in LOSS_SPECS.items() if name in spec.knobs)
        return f"does not read it, only {readers}"


def knob_readers(name: str) -> str:
    """Which losses read a knob and their defaults, such as "dpo 0.1, wpo 0.1"."""
    return ", ".join(
        f"{loss} {spec.knobs[name]}" for loss, spec in LOSS_SPECS.items() if name in spec.knobs
    )


_SMOOTHING = {"label_smoothing": 0.0}
_DIVERGENCE = {"f_divergence": "reverse_kl", "f_divergence_alpha": 0.5}

# The loss files name the source of every default.
LOSS_SPECS: dict[DPOLossType, LossSpec] = {
    DPOLossType.DPO: LossSpec(
        "DPO",
        "logistic loss on the margin of summed log-ratios",
        {"beta": 0.1, **_SMOOTHING, **_DIVERGENCE},
    ),
    DPOLossType.DPO_NORM: LossSpec(
        "DPONorm",
        "DPO on log-ratios a token (Tülu 3)",
        {"beta": 5.0, **_SMOOTHING},
    ),
    DPOLossType.SIMPO: LossSpec(
        "SimPO",
        "margin of mean log-probs against a target, without a reference",
        {"beta": 2.0, "gamma_beta_ratio": 0.5, **_SMOOTHING},
        needs_reference=False,
    ),
    DPOLossType.WPO: LossSpec(
        "WPO",
        "DPO with each pair weighted by how likely the policy is to write it",
        {"beta": 0.1, **_SMOOTHING, "wpo_alignment": "sampled", "wpo_cap": "one"},
        reads_alignment=True,
    ),
    DPOLossType.IPO: LossSpec(
        "IPO",
        "squared distance of the margin from a finite target",
        {"beta": 0.1, "ipo_log_ratios": "sum"},
    ),
    DPOLossType.HINGE: LossSpec(
        "Hinge",
        "hinge loss on DPO's margin (SLiC, RSO): nothing beyond margin 1/beta",
        {"beta": 0.05, **_DIVERGENCE},
    ),
    DPOLossType.ROBUST: LossSpec(
        "Robust",
        "DPO, unbiased where a known share of labels is swapped (rDPO)",
        {"beta": 0.1, "label_smoothing": 0.1, **_DIVERGENCE},
    ),
    DPOLossType.EXO_PAIR: LossSpec(
        "EXOPair",
        "reverse KL from the preference that the policy implies to the smoothed label",
        {"beta": 0.5, "label_smoothing": 1e-3, **_DIVERGENCE},
        narrower={"label_smoothing": Knob("label_smoothing", Range(0.0, 0.5, True, True))},
    ),
    DPOLossType.NCA_PAIR: LossSpec(
        "NCAPair",
        "noise contrastive: raises the chosen answer itself, not only its lead",
        {"beta": 0.1},
    ),
    DPOLossType.BCO_PAIR: LossSpec(
        "BCOPair",
        "binary classifier: chosen above and rejected below the reference",
        {"beta": 0.1},
    ),
    DPOLossType.SPPO_HARD: LossSpec(
        "SPPOHard",
        "squared distance of each log-ratio from its own target (self-play, certain labels)",
        {"beta": 0.01},
    ),
    DPOLossType.APO_ZERO: LossSpec(
        "APOZero",
        "anchored: chosen up, rejected down; for answers better than the model's own",
        {"beta": 0.1},
    ),
    DPOLossType.APO_DOWN: LossSpec(
        "APODown",
        "anchored: both down, rejected more; for answers worse than the model's own",
        {"beta": 1.0},
    ),
    DPOLossType.DISCOPOP: LossSpec(
        "DiscoPOP",
        "blend of the logistic and the exponential loss, found by a language model",
        {"beta": 0.05, "discopop_tau": 0.05, **_DIVERGENCE},
    ),
    DPOLossType.DPOP: LossSpec(
        "DPOP",
        "DPO with a penalty where the chosen answer falls below the reference (Smaug)",
        {"beta": 0.3, "dpop_lambda": 50.0},
    ),
    DPOLossType.ORPO: LossSpec(
        "ORPO",
        "fine-tuning on the chosen answer plus an odds ratio, without a reference",
        {"beta": 0.1, "orpo_nll": "answer"},
        needs_reference=False,
    ),
    DPOLossType.CPO: LossSpec(
        "CPO",
        "DPO against a uniform reference plus fine-tuning on the chosen answer",
        {"beta": 0.1, **_SMOOTHING, "cpo_alpha": 1.0, "cpo_nll": "sum"},
        needs_reference=False,
    ),
    DPOLossType.ODPO: LossSpec(
        "ODPO",
        "DPO that asks for a lead as large as the pair's margin column says",
        {"beta": 0.1, "odpo_alpha": 1.0},
        reads_margin=True,
    ),
    DPOLossType.AOT: LossSpec(
        "AOT",
        "DPO's loss between sorted margins of policy and reference, over the whole batch",
        {"beta": 0.1, **_SMOOTHING},
        needs_global_batch=True,
    ),
    DPOLossType.AOT_UNPAIRED: LossSpec(
        "AOTUnpaired",
        "DPO's loss between sorted log-ratios of chosen and rejected, over the whole batch",
        {"beta": 0.3, **_SMOOTHING},
        needs_global_batch=True,
    ),
    DPOLossType.BETA_DPO: LossSpec(
        "BetaDPO",
        "DPO with a beta that follows the batch's mean margin",
        {"beta": 0.1, "beta_dpo_alpha": 0.6, "beta_dpo_momentum": 0.9},
        needs_global_batch=True,
    ),
    DPOLossType.KTO: LossSpec(
        "KTO",
        "single labelled completions: gains and losses against a KL estimate, both saturating",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        needs_global_batch=True,
        unpaired=True,
        reads_mismatched=True,
    ),
    DPOLossType.BCO: LossSpec(
        "BCO",
        "single labelled completions: a binary classifier with a running threshold",
        {"beta": 0.01, "bco_momentum": 0.9},
        needs_global_batch=True,
        unpaired=True,
    ),
}
