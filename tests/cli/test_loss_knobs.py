"""A knob given with a loss that does not read it ends with exit 2, for every pair of the two."""

import pytest

from preftune.cli.main import main
from preftune.losses.knobs import KNOBS
from preftune.losses.spec import LOSS_SPECS, DPOLossType


def argument(name: str) -> str:
    knob = KNOBS[name]
    return knob.choices[-1] if knob.choices else "0.25"


def options(loss: str, *words: str) -> list[str]:
    needed = ["--model_name_or_path", "m", "--dataset_name", "d", "--loss_type", loss]
    return ["config", "show", *needed, *words]


def given(loss: str, name: str) -> list[str]:
    return options(loss, f"--{name}", argument(name))


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("loss", DPOLossType)
def test_a_knob_is_taken_or_refused_by_name(loss, name, capsys):
    if name in LOSS_SPECS[loss].applying({}):
        assert main(given(loss, name)) == 0
        assert f"{name}: {argument(name)}" in capsys.readouterr().out
        return
    assert main(given(loss, name)) == 2
    shown, reads = argument(name), LOSS_SPECS[loss].refusal(name)
    shown = shown if not KNOBS[name].choices else f"'{shown}'"
    assert f"--{name} is {shown}; the loss {loss} {reads}" in capsys.readouterr().err


@pytest.mark.parametrize("loss", DPOLossType)
def test_ld_alpha_is_for_losses_on_pairs_that_read_the_reference(loss, capsys):
    words = options(loss, "--ld_alpha", "0.25")
    if loss not in {"simpo", "orpo", "cpo", "kto", "bco"}:
        assert main(words) == 0
        assert "ld_alpha: 0.25" in capsys.readouterr().out
        return
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"--ld_alpha is 0.25; the loss {loss} " in said
    assert "does not read it; leave it at 1 (off)" in said
