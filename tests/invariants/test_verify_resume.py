"""`preftune verify-resume` says that a good run resumes, and where a bad one parts."""

import pytest

from preftune.cli.main import main
from preftune.recipes import run
from preftune.training import restore
from preftune.training.loop import TrainingLoop
from tests.runs import arguments, tiny_settings
from tests.tiny import tiny_model, tiny_tokenizer


def verify(root, **options) -> int:
    lengths = {"verify_steps": 6, "verify_stop_after": 3}
    words = arguments(tiny_settings(root, **lengths | options))
    return main(["verify-resume", *words])


def test_a_run_that_resumes_is_said_to(tmp_path, capsys):
    assert verify(tmp_path, test_size=5, eval_steps=2) == 0
    out = capsys.readouterr().out
    assert "6 steps straight, and the same stopped after step 3 and resumed, are one run" in out
    assert "the rows of 3 steps" in out
    assert "bit for bit" in out
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"model", "pairs.jsonl", "cache"}


def test_a_limit_of_space_does_not_take_the_checkpoint_to_resume_from(tmp_path):
    assert verify(tmp_path, verify_stop_after=2, checkpoint_max_gb=1e-6) == 0


def test_optimizer_state_that_is_lost_is_seen(tmp_path, capsys, monkeypatch):
    def load_without_moments(folder, state, model, **options):
        load_checkpoint(folder, state, model, **options)
        state.engine.optimizer.state.clear()

    load_checkpoint = restore.load_checkpoint
    monkeypatch.setattr(run, "load_checkpoint", load_without_moments)
    assert verify(tmp_path) == 2
    said = capsys.readouterr().err
    assert "the metrics part at step 5" in said  # step 4 differs only in its update
    assert (tmp_path / "run.verify-resume" / "resumed").is_dir()


def test_random_numbers_that_are_lost_are_seen(tmp_path, capsys, monkeypatch):
    tiny_model(attention_dropout=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert verify(tmp_path, disable_dropout=False) == 0
    monkeypatch.setattr(restore, "restore_generators", lambda *_: None)
    assert verify(tmp_path, disable_dropout=False) == 2
    assert "the metrics part at step 4: " in capsys.readouterr().err


def test_rows_in_another_order_are_seen(tmp_path, capsys, monkeypatch):
    lay_out = TrainingLoop._lay_out

    def one_behind(self, step):
        return lay_out(self, step if self.config.resume == "never" else step - 1)

    monkeypatch.setattr(TrainingLoop, "_lay_out", one_behind)
    assert verify(tmp_path) == 2
    said = capsys.readouterr().err
    assert "the order of the data parts at step 4: straight it trained on " in said
    assert "pairs.jsonl:" in said


def test_an_earlier_comparison_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "run.verify-resume" / "straight").mkdir(parents=True)
    (tmp_path / "run.verify-resume" / "straight" / "kept").write_text("")
    assert verify(tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "run.verify-resume" / "straight" / "kept").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--verify_steps", "1"], "verify_steps is 1; it must be"),
        (["--verify_stop_after", "20"], "verify_stop_after is 20; it must be below verify_steps"),
    ],
)
def test_mistakes(tmp_path, capsys, words, text):
    assert main(["verify-resume", *arguments(tiny_settings(tmp_path)), *words]) == 2
    assert text in capsys.readouterr().err
