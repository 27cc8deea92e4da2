"""The commonest mistakes: exit 2, one message with key or row, value and remedy, nothing harmed."""

import json
from pathlib import Path

import pytest

from preftune.cli.main import main
from tests.runs import arguments, tiny_settings
from tests.tiny import chat_row, make_pairs, write_jsonl


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path, test_size=4, num_epochs=1.0)


def snapshot(root: Path) -> dict[str, bytes]:
    """Every file outside the cache, with its content."""
    files = (p for p in root.rglob("*") if p.is_file())
    return {str(p): p.read_bytes() for p in files if "cache" not in p.parts}


def fails(capsys, tmp_path, words: list[str], *expected: str) -> None:
    before = snapshot(tmp_path)
    for command in ("check", "train"):
        assert main([command, *words]) == 2
        error = capsys.readouterr().err
        # Counts and notes of reading may come before; the error is one message at the end.
        assert error.count("preftune: error:") == 1
        assert "Traceback" not in error
        for text in expected:
            assert text in error, error
    assert snapshot(tmp_path) == before


def rows_with(number: int, **columns) -> list[dict]:
    rows = make_pairs(10, seed=0)
    rows[number - 1] |= columns
    return rows


def test_flag_typo(capsys, tmp_path, settings):
    words = [*arguments(settings), "--learning_rat", "1e-4"]
    fails(capsys, tmp_path, words, "--learning_rat is not an option", "--learning_rate")


def test_yaml_key_typo(capsys, tmp_path, settings):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nlearning_rte: 1.0e-4\n")
    words = [str(file), *arguments(settings)]
    fails(capsys, tmp_path, words, "c.yaml line 2", "learning_rte", "learning_rate")


def test_wrong_enum(capsys, tmp_path, settings):
    words = arguments(settings | {"loss_type": "sigmod"})
    fails(capsys, tmp_path, words, "loss_type is", "sigmod", "dpo_norm")


def test_beta_zero(capsys, tmp_path, settings):
    fails(capsys, tmp_path, arguments(settings | {"beta": 0}), "beta is 0", "above 0")


def test_negative_learning_rate(capsys, tmp_path, settings):
    words = arguments(settings | {"learning_rate": -1e-5})
    fails(capsys, tmp_path, words, "learning_rate is -1e-05", "above 0")


def test_missing_file(capsys, tmp_path, settings):
    words = arguments(settings | {"dataset_name": tmp_path / "absent.jsonl"})
    fails(capsys, tmp_path, words, "absent.jsonl", "no such")


def test_empty_file(capsys, tmp_path, settings):
    (tmp_path / "empty.jsonl").write_text("")
    words = arguments(settings | {"dataset_name": tmp_path / "empty.jsonl"})
    fails(capsys, tmp_path, words, "empty.jsonl", "no rows")


def test_broken_json_on_line_7(capsys, tmp_path, settings):
    file = write_jsonl(tmp_path / "broken.jsonl", make_pairs(10))
    lines = file.read_text().splitlines()
    lines[6] = lines[6][:-1]
    file.write_text("\n".join(lines))
    words = arguments(settings | {"dataset_name": file})
    fails(capsys, tmp_path, words, "broken.jsonl:7", "not valid JSON")


def test_missing_column(capsys, tmp_path, settings):
    names = {"prompt": "prompt", "chosen": "good", "rejected": "bad"}
    rows = [{names[key]: value for key, value in row.items()} for row in make_pairs(3)]
    file = write_jsonl(tmp_path / "columns.jsonl", rows)
    words = arguments(settings | {"dataset_name": file})
    fails(capsys, tmp_path, words, "columns.jsonl:1", "chosen", "good", "column_map")


def test_number_where_text_belongs(capsys, tmp_path, settings):
    file = write_jsonl(tmp_path / "typed.jsonl", rows_with(4, chosen=17))
    words = arguments(settings | {"dataset_name": file})
    fails(capsys, tmp_path, words, "typed.jsonl:4", "chosen", "17")


def test_equal_answers_beyond_the_allowance(capsys, tmp_path, settings):
    rows = rows_with(2, **{k: chat_row("q", "same", "same")[k] for k in ("chosen", "rejected")})
    file = write_jsonl(tmp_path / "equal.jsonl", rows)
    words = arguments(settings | {"dataset_name": file})
    fails(capsys, tmp_path, words, "equal_completions", "equal.jsonl:2", "max_dropped_fraction")


def test_foreign_output_dir(capsys, tmp_path, settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    fails(capsys, tmp_path, arguments(settings), "output_dir", "thesis.tex", "new or empty")


def test_another_configuration_in_output_dir(capsys, tmp_path, settings):
    assert main(["train", *arguments(settings)]) == 0
    words = arguments(settings | {"learning_rate": 5e-4, "beta": 0.3})
    fails(
        capsys, tmp_path, words, "beta was 0.1, now 0.3", "learning_rate was 0.001", "--output_dir"
    )


def test_model_folder_without_weights(capsys, tmp_path, settings):
    (tmp_path / "hollow").mkdir()
    config = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "hollow" / "config.json").write_text(config)
    words = arguments(settings | {"model_name_or_path": tmp_path / "hollow"})
    fails(capsys, tmp_path, words, "model_name_or_path", "no weights", "*.safetensors")


def test_unknown_chat_template(capsys, tmp_path, settings):
    words = arguments(settings | {"chat_template": "chatlm"})
    fails(capsys, tmp_path, words, "chat_template", "chatlm", "chatml")


def test_several_at_once_are_all_told(capsys, tmp_path, settings):
    words = arguments(settings | {"beta": -1, "max_length": 0, "resume": "never"})
    fails(capsys, tmp_path, words, "beta is -1", "max_length is 0")


def test_an_absent_checkpoint(capsys, tmp_path, settings):
    words = arguments(settings | {"resume": tmp_path / "nowhere"})
    fails(capsys, tmp_path, words, "resume is", "nowhere", "no complete checkpoint")


def test_never_refuses_a_folder_with_a_run(capsys, tmp_path, settings):
    assert main(["train", *arguments(settings)]) == 0
    words = arguments(settings | {"resume": "never"})
    fails(capsys, tmp_path, words, "not empty", "--resume auto")


def test_a_wrong_path_of_the_model(capsys, tmp_path, settings):
    words = arguments(settings | {"model_name_or_path": "./no/such/model"})
    fails(capsys, tmp_path, words, "model_name_or_path is './no/such/model'", "no such folder")


def test_a_manifest_of_something_else(capsys, tmp_path, settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"name": "another tool"}))
    fails(capsys, tmp_path, arguments(settings), "not written by preftune", "--output_dir")


def test_rows_longer_than_the_models_positions(capsys, tmp_path, settings):
    rows = [*make_pairs(8), *make_pairs(1, completion_words=(600, 600))]
    file = write_jsonl(tmp_path / "long.jsonl", rows)
    words = arguments(settings | {"dataset_name": file})
    fails(capsys, tmp_path, words, "long.jsonl:9", "512 positions", "--max_length 512")


def test_a_tokenizer_of_another_model(capsys, tmp_path, settings):
    config_file = tmp_path / "model" / "config.json"
    config = json.loads(config_file.read_text()) | {"vocab_size": 200}
    config_file.write_text(json.dumps(config))
    fails(capsys, tmp_path, arguments(settings), "only 200 tokens", "tokenizer_name_or_path")


def test_a_chat_template_for_plain_text(capsys, tmp_path, settings):
    file = write_jsonl(tmp_path / "text.jsonl", make_pairs(10, chat=False))
    words = arguments(settings | {"dataset_name": file, "chat_template": "chatml"})
    fails(capsys, tmp_path, words, "chat_template is 'chatml'", "plain text", "leave it out")


def test_what_is_not_read_yet_is_said(capsys, tmp_path, settings):
    rows = [row | {"weight": 2.0} for row in make_pairs(10, chat=False)]
    file = write_jsonl(tmp_path / "text.jsonl", rows)
    assert main(["check", *arguments(settings | {"dataset_name": file})]) == 0
    printed = capsys.readouterr().out
    assert "6 are plain text, without a chat template" in printed
    assert "columns not read yet: weight" in printed
