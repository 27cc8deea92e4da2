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
    values, slopes = loss_docs.curve(make_loss(DPOLossType.DPO), margins)
    assert values.tolist() == pytest.approx([3.0485873516, 0.6931471806, 0.0485873516])
    assert slopes.tolist() == pytest.approx([-0.0952574127, -0.05, -0.0047425873])


def test_pictures_are_drawn(loss_docs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(loss_docs, "DPOLossType", [DPOLossType.IPO])
    loss_docs.draw(tmp_path / "losses")
    text = (tmp_path / "losses" / "ipo.svg").read_text(encoding="utf-8")
    assert "ipo: value" in text
    assert "ipo: slope" in text
