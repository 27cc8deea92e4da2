"""Which loss of TRL is which of preftune: one line a case, all of them trained both ways."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """One loss in both tools."""

    name: str
    theirs: Mapping[str, Any]
    """Options of TRL's config."""
    ours: Mapping[str, Any]
    """Options of preftune's."""
    form: Mapping[str, Any] = field(default_factory=dict)
    """Options of preftune's that choose TRL's form, where its default is the paper's."""
    trainer: str = "DPO"
    """Of TRL: DPO, CPO, ORPO or KTO."""
    their_micro_batch: int = 2
    """Pairs of a micro-batch in TRL. 1 where it takes a mean over the tokens of a micro-batch: of
    one pair that is the mean over its tokens. `BATCH` where it compares the pairs of a micro-batch
    with each other, or preftune takes the mean over tokens, too: of those of the step."""

    @property
    def their_losses(self) -> set[tuple[str, str]]:
        """Trainer and name of each loss of TRL that is trained."""
        if self.trainer in ("ORPO", "KTO"):
            return {(self.trainer, self.trainer.lower())}
        names = self.theirs.get("loss_type", "sigmoid")
        return {(self.trainer, name) for name in ([names] if isinstance(names, str) else names)}


BATCH = 4
"""Pairs of a step, in micro-batches of two in preftune."""

_SMOOTHED = {"label_smoothing": 0.1}
_HALF = {"beta": 0.5}
"""With the pairs' margins of about a nat: well off where the losses are straight lines."""


def _same(loss: str, theirs: str | None = None, **options: Any) -> Case:
    """A loss of `DPOTrainer` whose options have the same names and values in both tools."""
    return Case(loss, {"loss_type": [theirs or loss], **options}, {"loss_type": loss, **options})


_LOSSES = (
    _same("dpo", "sigmoid", **_HALF),
    _same("dpo_norm", "sigmoid_norm", beta=5.0),
    Case(
        "ipo",
        {"loss_type": ["ipo"], **_HALF},
        {"loss_type": "ipo", **_HALF},
        {"ipo_log_ratios": "mean"},
    ),
    _same("hinge", beta=1.0),
    _same("robust", **_HALF, **_SMOOTHED),
    _same("exo_pair", **_HALF, label_smoothing=1e-3),
    _same("nca_pair", **_HALF),
    _same("bco_pair", **_HALF),
    _same("sppo_hard", beta=1e-3),
    _same("apo_zero", **_HALF),
    _same("apo_down", **_HALF),
    _same("discopop", **_HALF, discopop_tau=0.1),
    replace(_same("aot", **_HALF, **_SMOOTHED), their_micro_batch=BATCH),
    replace(_same("aot_unpaired", **_HALF, **_SMOOTHED), their_micro_batch=BATCH),
    Case("wpo", {"use_weighting": True}, {"loss_type": "wpo"}, {"wpo_cap": "none"}),
)

_SUMS = (
    Case(
        "dpo + sft",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        {"loss_type": "dpo", "sft_weight": 0.2},
        their_micro_batch=1,
    ),
    Case(
        "mpo",
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {
            "loss_type": ["dpo", "bco_pair"],
            "loss_weights": [0.8, 0.2],
            "sft_weight": 1.0,
            "beta": 0.1,
        },
        their_micro_batch=1,
    ),
    Case(
        "hinge + apo_zero",
        {"loss_type": ["hinge", "apo_zero"], "loss_weights": [0.5, 2.0]},
        {"loss_type": ["hinge", "apo_zero"], "loss_weights": [0.5, 2.0], "beta": 0.1},
    ),
)

_WITHOUT_REFERENCE = (
    Case("cpo", {}, {"loss_type": "cpo"}, {"cpo_nll": "mean"}, trainer="CPO", their_micro_batch=1),
    Case(
        "cpo, smoothed",
        {**_SMOOTHED, "cpo_alpha": 0.5},
        {"loss_type": "cpo", **_SMOOTHED, "cpo_alpha": 0.5},
        {"cpo_nll": "mean"},
        trainer="CPO",
        their_micro_batch=1,
    ),
    Case(
        "simpo",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "gamma_beta_ratio": 0.5},
        trainer="CPO",
    ),
    Case(
        "simpo + sft, smoothed",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.3, **_SMOOTHED},
        {"loss_type": "simpo", "gamma_beta_ratio": 0.5, "sft_weight": 0.3, **_SMOOTHED},
        trainer="CPO",
        their_micro_batch=1,
    ),
    Case(
        "orpo",
        {},
        {"loss_type": "orpo"},
        {"orpo_nll": "sequence"},
        trainer="ORPO",
        their_micro_batch=1,
    ),
)

# TRL's KL estimate is of a micro-batch, preftune's of the step; one of 4 rows is undesirable.
_LABELLED = (
    Case("kto", _HALF, {"loss_type": "kto", **_HALF}, trainer="KTO", their_micro_batch=BATCH),
    Case(
        "kto, weighted",
        {"desirable_weight": 0.5, "undesirable_weight": 1.5},
        {"loss_type": "kto", "desirable_weight": 0.5, "undesirable_weight": 1.5},
        trainer="KTO",
        their_micro_batch=BATCH,
    ),
)

_SHORTER = {"ld_alpha": 0.3}
_WITH_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
_MODIFIED = (
    Case("dpo, ld_alpha", {**_SHORTER, **_HALF}, {"loss_type": "dpo", **_SHORTER, **_HALF}),
    Case(
        "ipo, ld_alpha",
        {"loss_type": ["ipo"], **_SHORTER, **_HALF},
        {"loss_type": "ipo", **_SHORTER, **_HALF},
        {"ipo_log_ratios": "mean"},
    ),
    Case(
        "wpo, ld_alpha",
        {"use_weighting": True, **_SHORTER},
        {"loss_type": "wpo", **_SHORTER},
        {"wpo_cap": "none"},
    ),
    Case(
        "dpo, following reference",
        {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 6, **_HALF},
        {
            "loss_type": "dpo",
            "sync_reference": True,
            "reference_mixup_alpha": 0.3,
            "reference_sync_steps": 6,
            **_HALF,
        },
    ),
    Case(
        "dpo + sft, tokens",
        _WITH_SFT,
        {"loss_type": "dpo", "sft_weight": 0.2},
        {"sft_reduction": "token"},
        their_micro_batch=BATCH,
    ),
    Case(
        "dpo + sft, tokens, ld_alpha",
        {**_WITH_SFT, **_SHORTER},
        {"loss_type": "dpo", "sft_weight": 0.2, **_SHORTER},
        {"sft_reduction": "token"},
        their_micro_batch=BATCH,
    ),
    Case(
        "cpo, tokens",
        {},
        {"loss_type": "cpo"},
        {"cpo_nll": "token"},
        trainer="CPO",
        their_micro_batch=BATCH,
    ),
)

_DIVERGENCES = {
    "forward_kl": ({"f_divergence_type": "forward_kl"}, {"f_divergence": "forward_kl"}),
    "js": ({"f_divergence_type": "js_divergence"}, {"f_divergence": "js"}),
    # TRL's order is 1 − ours.
    "alpha": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        {"f_divergence": "alpha", "f_divergence_alpha": 0.3},
    ),
}
_WITH_DIVERGENCE = ("dpo", "hinge", "robust", "exo_pair", "discopop")

CASES = (
    *_LOSSES,
    *_SUMS,
    *_WITHOUT_REFERENCE,
    *_LABELLED,
    *_MODIFIED,
    *(
        Case(f"{case.name}, {name}", {**case.theirs, **theirs}, {**case.ours, **ours})
        for case in _LOSSES
        if case.name in _WITH_DIVERGENCE
        for name, (theirs, ours) in _DIVERGENCES.items()
    ),
)

LACKING = {
    ("CPO", "hinge"): "the hinge loss without a reference",
    ("CPO", "ipo"): "IPO without a reference",
    ("CPO", "alphapo"): "SimPO's rewards reshaped (AlphaPO)",
    ("KTO", "apo_zero_unpaired"): "APO on unpaired rows",
}
"""Losses of TRL that preftune does not have, and what they are."""
