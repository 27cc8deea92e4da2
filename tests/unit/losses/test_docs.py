"""docs/losses.md says what the losses say."""

import importlib.util
from pathlib import Path

import pytest
import torch

from preftune.losses import DPOLossType, make_loss

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def loss_docs():
    spec = importlib.util.spec_from_file_location("loss_docs", ROOT / "scripts" / "loss_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_makes(loss_docs):
    written = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert written == loss_docs.page(), "run python scripts/loss_docs.py"


def test_the_readme_names_every_loss():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [loss for loss in DPOLossType if f"`{loss}`" not in text] == []


def test_every_loss_has_its_picture():
    pictures = {path.stem for path in (ROOT / "docs" / "losses").glob("*.svg")}
    assert pictures == {loss.value for loss in DPOLossType}


def test_the_curve_is_the_loss_of_the_margin(loss_docs):
    """DPO at margins −30, 0 and 30: softplus(−z) and −β σ(−z) at z = −3, 0 and 3."""
    margins = torch.tensor([-30.0, 0.0, 30.0], dtype=torch.float64)
    values, slopes = loss_docs.curve(make_loss(DPOLossType.DPO), margins)[""]
    assert values.tolist() == pytest.approx([3.0485873516, 0.6931471806, 0.0485873516])
    assert slopes.tolist() == pytest.approx([-0.0952574127, -0.05, -0.0047425873])


@pytest.mark.parametrize(
    ("loss_type", "values", "slopes"),
    [
        # 1 − σ(z) and −β σ(z) σ(−z) at z = −1, 0 and 1
        (
            DPOLossType.KTO,
            [0.7310585786, 0.5, 0.2689414214],
            [-0.0196611933, -0.025, -0.0196611933],
        ),
        # softplus(−z) and −β σ(−z)
        (
            DPOLossType.BCO,
            [1.3132616875, 0.6931471806, 0.3132616875],
            [-0.0731058579, -0.05, -0.0268941421],
        ),
    ],
)
def test_the_curves_of_single_completions_are_against_a_baseline_of_0(
    loss_docs, loss_type, values, slopes
):
    ratios = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64)
    curves = loss_docs.unpaired_curves(make_loss(loss_type), ratios)
    assert list(curves) == ["desirable", "undesirable"]
    assert curves["desirable"][0].tolist() == pytest.approx(values)
    assert curves["desirable"][1].tolist() == pytest.approx(slopes)
    assert curves["undesirable"][0].tolist() == pytest.approx(values[::-1])
    assert curves["undesirable"][1].tolist() == pytest.approx([-x for x in slopes[::-1]])


def test_bars_of_a_formula_do_not_end_a_cell(loss_docs):
    rows = [line for line in loss_docs.page().splitlines() if line.startswith("| [`")]
    bars = [line.replace(r"\|", "").count("|") for line in rows]
    assert sorted(set(bars)) == [5, 7]
    assert any(r"\|" in line for line in rows)


@pytest.mark.parametrize(
    ("loss_type", "words"),
    [("ipo", ["margin s_w"]), ("kto", [">desirable<", ">undesirable<", "log-ratio s"])],
)
def test_pictures_are_drawn(loss_docs, tmp_path, monkeypatch, loss_type, words):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loss_docs, "DPOLossType", [DPOLossType(loss_type)])
    loss_docs.draw(tmp_path / "losses")
    text = (tmp_path / "losses" / f"{loss_type}.svg").read_text(encoding="utf-8")
    for word in (f"{loss_type}: value", f"{loss_type}: slope", *words):
        assert word in text
