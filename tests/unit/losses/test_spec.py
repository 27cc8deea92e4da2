"""The table of losses and the ranges of their knobs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import preftune
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 0, "beta is 0; it must be a finite number above 0"),
        ("beta", -0.5, "beta is -0.5; it must be a finite number above 0"),
        ("beta", math.nan, "beta is nan; it must be a finite number above 0"),
        ("beta", math.inf, "beta is inf; it must be a finite number above 0"),
        ("beta", "0.1", "beta is '0.1'; it must be a finite number above 0"),
        ("beta", True, "beta is True; it must be a finite number above 0"),
        ("beta", None, "beta is None; it must be a finite number above 0"),
        (
            "label_smoothing",
            0.5,
            "label_smoothing is 0.5; it must be a finite number at least 0 and below 0.5",
        ),
        (
            "label_smoothing",
            -1e-9,
            "label_smoothing is -1e-09; it must be a finite number at least 0 and below 0.5",
        ),
        (
            "gamma_beta_ratio",
            -1,
            "gamma_beta_ratio is -1; it must be a finite number at least 0",
        ),
        (
            "gamma_beta_ratio",
            math.inf,
            "gamma_beta_ratio is inf; it must be a finite number at least 0",
        ),
        (
            "wpo_alignment",
            "greedy",
            "wpo_alignment is 'greedy'; it must be one of sampled, none",
        ),
        ("wpo_alignment", False, "wpo_alignment is False; it must be one of sampled, none"),
        ("wpo_alignment", None, "wpo_alignment is None; it must be one of sampled, none"),
    ],
)
def test_a_bad_value_is_named_with_its_range(name: str, value: object, message: str) -> None:
    assert KNOBS[name].problem(value) == message


def test_a_whole_number_too_large_for_a_float_is_no_finite_number() -> None:
    assert KNOBS["beta"].problem(10**400) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 1e-6),
        ("beta", 5),
        ("label_smoothing", 0),
        ("label_smoothing", 0.0),
        ("label_smoothing", 0.4999),
        ("gamma_beta_ratio", 0),
        ("gamma_beta_ratio", 1.6),
        ("wpo_alignment", "sampled"),
        ("wpo_alignment", "none"),
    ],
)
def test_a_legal_value_has_no_problem(name: str, value: object) -> None:
    assert KNOBS[name].problem(value) is None


def test_documented_defaults() -> None:
    """The defaults of DESIGN section 8, written out once more on purpose."""
    kl = {"f_divergence": "reverse_kl", "f_divergence_alpha": 0.5}
    assert {str(name): dict(spec.knobs) for name, spec in LOSS_SPECS.items()} == {
        "dpo": {"beta": 0.1, "label_smoothing": 0.0, **kl},
        "dpo_norm": {"beta": 5.0, "label_smoothing": 0.0},
        "simpo": {"beta": 2.0, "gamma_beta_ratio": 0.5, "label_smoothing": 0.0},
        "wpo": {
            "beta": 0.1,
            "label_smoothing": 0.0,
            "wpo_alignment": "sampled",
            "wpo_cap": "one",
        },
        "ipo": {"beta": 0.1, "ipo_log_ratios": "sum"},
        "hinge": {"beta": 0.05, **kl},
        "robust": {"beta": 0.1, "label_smoothing": 0.1, **kl},
        "exo_pair": {"beta": 0.5, "label_smoothing": 0.001, **kl},
        "nca_pair": {"beta": 0.1},
        "bco_pair": {"beta": 0.1},
        "sppo_hard": {"beta": 0.01},
        "apo_zero": {"beta": 0.1},
        "apo_down": {"beta": 1.0},
        "discopop": {"beta": 0.05, "discopop_tau": 0.05, **kl},
        "dpop": {"beta": 0.3, "dpop_lambda": 50.0},
        "orpo": {"beta": 0.1, "orpo_nll": "answer"},
        "odpo": {"beta": 0.1, "odpo_alpha": 1.0},
        "aot": {"beta": 0.1, "label_smoothing": 0.0},
        "aot_unpaired": {"beta": 0.3, "label_smoothing": 0.0},
        "beta_dpo": {"beta": 0.1, "beta_dpo_alpha": 0.6, "beta_dpo_momentum": 0.9},
        "cpo": {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "cpo_nll": "sum"},
        "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        "bco": {"beta": 0.01, "bco_momentum": 0.9},
    }


def test_every_name_has_a_spec_and_every_knob_a_reader() -> None:
    assert list(LOSS_SPECS) == list(DPOLossType)
    assert {name for spec in LOSS_SPECS.values() for name in spec.knobs} == set(KNOBS)
    assert all(spec.summary and "\n" not in spec.summary for spec in LOSS_SPECS.values())


def test_the_defaults_are_in_range() -> None:
    problems = [
        spec.knob(name).problem(value)
        for spec in LOSS_SPECS.values()
        for name, value in spec.knobs.items()
    ]
    assert problems == [None] * len(problems)


def test_the_spec_is_read_without_torch() -> None:
    """Config and `--help` import the spec; a fresh interpreter must not load torch for it."""
    code = (
        "import sys, preftune.losses, preftune.losses.spec\n"
        "assert preftune.losses.DPOLossType.WPO == 'wpo'\n"
        "print([m for m in ('torch', 'numpy', 'jaxtyping') if m in sys.modules])"
    )
    source = str(Path(preftune.__file__).parents[1])
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_an_absent_name_is_an_attribute_error() -> None:
    import preftune.losses

    with pytest.raises(AttributeError, match=r"'preftune\.losses' has no attribute 'PPO'"):
        _ = preftune.losses.PPO  # type: ignore[attr-defined]
