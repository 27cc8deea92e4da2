"""`preftune data`: a run's data looked at and tokenised, through the command line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from preftune.cli.main import main
from preftune.recipes import inspect_data as recipe
from tests.runs import arguments, tiny_settings
from tests.tiny import chat_row, make_pairs, write_jsonl

ATTACK = "<script>alert(1)</script> \x1b[31m & \"'"


def words_of(root: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    data = write_jsonl(root / "d.jsonl", rows)
    return arguments(tiny_settings(root, dataset_name=data) | options)


def inspect(capsys: Any, words: list[str]) -> str:
    assert main(["data", "inspect", *words]) == 0
    return capsys.readouterr().out


def line(text: str, start: str) -> list[str]:
    """The cells of the first line of a table that begins so."""
    found = next(x.strip() for x in text.splitlines() if x.strip().startswith(start))
    return re.split(r" {2,}", found)


ROWS = [
    chat_row("capital?", "Paris", "Berlin"),
    chat_row("capital?", "Berlin", "Paris"),
    chat_row("capital?", "Paris", "Berlin"),
    chat_row("large?", "big\nbig", "cat"),
    chat_row("large?", " ", "cat"),
    chat_row("warm?", "yes yes yes yes yes yes yes yes yes yes yes yes", "no"),
]
"""Row 3 repeats row 1, row 2 contradicts both, row 5 has an empty answer, row 6 is long."""


def test_what_is_shown_of_six_rows(capsys, tmp_path):
    words = words_of(tmp_path, ROWS, max_length=30)
    text = inspect(capsys, words)
    assert line(text, "source")[1:] == ["read", "kept", "dropped", "not drawn", "cut", "repeats"]
    assert line(text, str(tmp_path / "d.jsonl"))[1:] == ["6", "4", "2", "0", "0", "0"]
    for proof in ("prefix", "bos", "stop", "round_trip", "verbatim"):
        assert line(text, proof)[1:3] == ["4", "0"]
    assert line(text, "distinct prompts")[1:] == ["2"]
    assert line(text, "pairs a prompt")[1:] == ["2.00 on average, 3 at most"]
    assert line(text, "pairs on a shared prompt")[1:] == ["3 (75.0%)"]
    repeated = line(text, "rows equal to an earlier one")
    assert repeated[1:] == ["1", "d.jsonl:3 = d.jsonl:1"]
    swapped = line(text, "rows whose two answers are also paired the other way round")
    assert swapped[1:] == ["3", "on 1 prompts"]
    assert line(text, "distinct answers to a prompt")[1:] == ["4"]
    assert "d.jsonl:5  empty_completion" in text
    assert "d.jsonl:6  over_length" in text
    assert "warning: training would stop: 1 of 6 rows" in text
    assert "\x1b" not in text


def test_trained_tokens_stand_in_brackets_and_blanks_show(capsys, tmp_path):
    text = inspect(capsys, words_of(tmp_path, ROWS[:4], row="d.jsonl:4"))
    shown = text[text.index("\nd.jsonl:4") : text.index("Rows\n")]
    assert "<|im_start|>assistant↵\n" in shown
    assert "    ⟦b¦i¦g¦↵\n    ¦b¦i¦g¦<|im_end|>⟧\n" in shown.replace("bi¦g", "b¦i¦g")
    assert shown.count("⟦") == 2
    assert "\nd.jsonl:1\n" not in text


@pytest.mark.parametrize(
    ("row_id", "said"),
    [
        ("d.jsonl:5", "empty_completion"),
        ("d.jsonl:6", "over_length"),
    ],
)
def test_a_dropped_row_is_shown_with_its_reason(capsys, tmp_path, row_id, said):
    words = words_of(tmp_path, ROWS, max_length=30, row=row_id)
    assert f"Not trained on: {said}: " in inspect(capsys, words)


def test_a_row_that_is_not_there(capsys, tmp_path):
    assert main(["data", "inspect", *words_of(tmp_path, ROWS[:4], row="d.jsonl:40")]) == 2
    assert "row is 'd.jsonl:40'" in capsys.readouterr().err


def test_what_a_cut_removes_is_shown(capsys, tmp_path):
    options = {"max_length": 30, "truncation": "keep_end", "num_rows": 1}
    text = inspect(capsys, words_of(tmp_path, [*ROWS[:4], ROWS[5]], **options))
    shown = text[text.index("\nd.jsonl:5") : text.index("Rows\n")]
    assert "✂⟨<|im_start|>user↵" in shown
    assert "cut off" in shown
    cost = [x.split() for x in text.splitlines() if x.endswith("configured")]
    assert cost[0][:4] == ["30", "1", "keep_end", "0.0%"]


def test_the_page_is_one_escaped_file(capsys, tmp_path):
    rows = [
        chat_row(ATTACK, f"Yes {ATTACK}\n\n two  blanks", f"No {ATTACK}"),
        *make_pairs(4),
        chat_row(ATTACK, " ", ATTACK),
    ]
    write_jsonl(tmp_path / "<b>d.jsonl", rows)
    page = tmp_path / "new" / "page.html"
    words = arguments(
        tiny_settings(tmp_path, dataset_name=tmp_path / "<b>d.jsonl")
        | {"html": page, "num_rows": 5, "max_dropped_fraction": 1}
    )
    inspect(capsys, words)
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    assert "\x1b" not in text
    assert not re.search(r"(src|href)=|https?:|@import|url\(", text)
    assert "color-scheme" in text
    plain = re.sub(r"<wbr>|</?span[^>]*>", "", text)
    assert (
        "Yes·&lt;script&gt;alert(1)&lt;/script&gt;·␛[31m·&amp;·&#34;&#39;↵\n↵\n·two··blanks"
        in plain
    )
    assert '<span class="trained' in text
    assert re.search(r'<span class="context[^>]* title="\d+">', text)
    assert "&lt;b&gt;d.jsonl:6</td><td>empty_completion" in text


def test_outputs_that_cannot_be_written_are_refused_before_anything_is_read(capsys, tmp_path):
    (tmp_path / "p.html").touch()
    (tmp_path / "d.jsonl").touch()
    words = arguments(tiny_settings(tmp_path) | {"dataset_name": tmp_path / "absent.jsonl"})
    outputs = ["--html", str(tmp_path / "p.html"), "--dropped", str(tmp_path / "d.jsonl")]
    assert main(["data", "inspect", *words, *outputs]) == 2
    error = capsys.readouterr().err
    assert "html is" in error
    assert "dropped is" in error
    assert error.count("which exists; give another name") == 2
    assert main(["data", "inspect", *words, "--html", str(tmp_path / "p.html" / "q.html")]) == 2
    assert "p.html is a file; give a folder" in capsys.readouterr().err


def test_every_dropped_row_can_be_written(capsys, tmp_path):
    rows = [chat_row(f"q{i}", "yes" if i % 2 else " ", "no") for i in range(50)]
    file = tmp_path / "dropped.jsonl"
    text = inspect(capsys, words_of(tmp_path, rows, dropped=file))
    written = [json.loads(x) for x in file.read_text(encoding="utf-8").splitlines()]
    assert [x["row_id"] for x in written] == [f"d.jsonl:{i}" for i in range(1, 51, 2)]
    assert {x["reason"] for x in written} == {"empty_completion"}
    assert "  d.jsonl:39  empty_completion\n  and 5 more" in text


def test_held_out_pairs_and_what_training_loses_to_them(capsys, tmp_path):
    train = [chat_row(f"q{i}", "yes", f"no {i}") for i in range(6)]
    held_out = write_jsonl(tmp_path / "test.jsonl", [train[2], chat_row("other", "yes", "never")])
    words = words_of(tmp_path, train, eval_dataset=f"{{ours: {held_out}}}", num_rows=0)
    text = inspect(capsys, words)
    assert "Training: " in text
    assert "Held out as ours: " in text
    # Of four held-out answers, "yes" twice is known; that of the shared prompt went with its row.
    assert line(text, "held out as ours")[1:] == ["0", "1", "2 (50.0%)"]
    assert "d.jsonl:3  prompt_held_out" in text
    shown = inspect(capsys, [*words, "--row", "d.jsonl:3"])
    assert "Not trained on: prompt_held_out" in shown


def test_pairs_split_off_are_looked_at_once_on_each_side(capsys, tmp_path):
    words = words_of(tmp_path, make_pairs(20), test_size=5, num_rows=1)
    text = inspect(capsys, words)
    assert "(15 pairs)" in text
    assert "(5 pairs)" in text
    assert text.count("What truncation would cost") == 1
    assert "Of these, 15 are here" in text
    assert line(text, "held out")[1:3] == ["0", "0"]


def test_a_mix_is_shown_by_source(capsys, tmp_path):
    a = write_jsonl(tmp_path / "a" / "d.jsonl", make_pairs(10))
    b = write_jsonl(tmp_path / "b" / "d.jsonl", make_pairs(4, seed=1))
    settings = tiny_settings(tmp_path) | {"dataset_mixer": f"{{{a}: 3, {b}: 2.0}}"}
    del settings["dataset_name"]
    text = inspect(capsys, arguments(settings | {"row": "d.jsonl:1"}))
    assert line(text, str(a))[1:] == ["10", "3", "0", "7", "0", "0"]
    assert line(text, str(b) + " ")[1:] == ["4", "4", "0", "0", "0", "4"]
    assert line(text, "all")[1:] == ["14", "7", "0", "7", "0", "4"]
    assert "an epoch has 11 pairs" in text
    assert line(text, "prefix")[1:3] == ["7", "0"]
    assert f"d.jsonl:1  {b}" in text  # both sources have a row of this name


def test_a_sample_is_proved_where_there_are_many_rows(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "MOST_PROVED", 5)
    text = inspect(capsys, words_of(tmp_path, make_pairs(20)))
    assert line(text, "prefix")[1:3] == ["5", "0"]
    assert "5 of 20 rows, drawn by the seed" in text


def test_rows_the_model_has_no_positions_for_are_looked_at_all_the_same(capsys, tmp_path):
    rows = [*make_pairs(3), chat_row("long?", "word " * 600, "no")]
    text = inspect(capsys, words_of(tmp_path, rows))
    assert "over_context" in text
    assert "and the model has 512 positions" in text


def test_weights_are_not_read(capsys, tmp_path):
    words = words_of(tmp_path, make_pairs(4))
    (tmp_path / "model" / "model.safetensors").write_text("no weights")
    assert "Length bias" in inspect(capsys, words)


def test_a_training_config_is_read_as_it_is(capsys, tmp_path):
    words = words_of(tmp_path, make_pairs(4), num_rows=1)
    words = words[: words.index("--num_rows")]
    assert main(["config", "show", *words]) == 0
    file = tmp_path / "config.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    assert "(4 pairs)" in inspect(capsys, [str(file)])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--num_rows", "-1"], "--num_rows is -1; it must be 0 or more"),
        (["--html", "page.txt"], "--html is 'page.txt'; it must be the path of a .html file"),
        (["--dropped", "rows.csv"], "--dropped is 'rows.csv'; it must be the path of a .jsonl"),
        (["--rows", "3"], "--rows is not an option"),
        (["--beta", "0"], "--beta is 0"),
    ],
)
def test_config_errors(capsys, tmp_path, options, text):
    words = words_of(tmp_path, ROWS[:2], progress="none")
    assert main(["data", "inspect", *words, *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "data needs a command; write: preftune data inspect or tokenize"),
        (["inspct"], "data inspct is not a command; write: preftune data inspect or tokenize"),
    ],
)
def test_an_unknown_word(capsys, argv, text):
    assert main(["data", *argv]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "tokenize"])
def test_help_of_both(capsys, command):
    assert main(["data", command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: preftune data {command} [CONFIG.yaml]")
    assert ("--html" in text) == (command == "inspect")


def test_tokenize_fills_the_cache_that_a_run_reads(capsys, tmp_path):
    held_out = write_jsonl(tmp_path / "test.jsonl", make_pairs(3, seed=5))
    words = words_of(tmp_path, make_pairs(9), eval_dataset=held_out)
    (tmp_path / "model" / "model.safetensors").write_text("no weights")
    assert main(["data", "tokenize", *words]) == 0
    made = capsys.readouterr().out
    assert f"{tmp_path / 'd.jsonl'}: tokenised, 9 rows" in made
    assert f"{held_out}: tokenised, 3 rows" in made
    assert str(tmp_path / "cache" / "datasets") in made
    assert len(list((tmp_path / "cache" / "datasets").glob("*/complete.json"))) == 2
    assert main(["data", "tokenize", *words]) == 0
    assert capsys.readouterr().out == made.replace("tokenised,", "found in the cache,")


LONE = [
    *({"prompt": f"q{i}?", "completion": f" a{i}", "label": i % 2 == 0} for i in range(4)),
    chat_row("capital?", "Paris", "Berlin", weight=0.5, margin=2),
    chat_row("large?", "big", " "),
]
"""Four lone answers, a pair, and a pair whose worse answer is empty."""


def test_rows_of_one_answer_and_pairs_taken_apart(capsys, tmp_path):
    page = tmp_path / "page.html"
    text = inspect(capsys, words_of(tmp_path, LONE, num_rows=7, html=page, loss_type="bco"))
    assert line(text, str(tmp_path / "d.jsonl"))[1:] == ["8", "7", "1", "0", "0", "0"]
    assert "(7 rows)" in text
    assert "(7 rows)" in page.read_text(encoding="utf-8")
    for shown in (text, page.read_text(encoding="utf-8")):
        assert shown.count("weight 0.5, margin 2") == 2
    for proof in ("prefix", "bos", "stop", "round_trip", "verbatim"):
        assert line(text, proof)[1:3] == ["7", "0"]
    assert line(text, "chosen (label true)")[1:3] == ["4", "57.1%"]
    assert line(text, "rejected (label false)")[1:3] == ["3", "42.9%"]
    assert line(text, "rows a prompt")[1:] == ["1.17 on average, 2 at most"]
    assert "d.jsonl:6 (rejected)  empty_completion" in text
    assert "Length bias" not in text


def test_both_answers_of_a_pair_are_shown_under_its_id(capsys, tmp_path):
    both = inspect(capsys, words_of(tmp_path, LONE, row="d.jsonl:5", loss_type="bco"))
    assert "\nd.jsonl:5 (chosen)\n" in both
    assert "\nd.jsonl:5 (rejected)\n" in both
    one = inspect(capsys, words_of(tmp_path, LONE, row="d.jsonl:5 (rejected)", loss_type="bco"))
    assert "\nd.jsonl:5 (rejected)\n" in one
    assert "\nd.jsonl:5 (chosen)\n" not in one
    lost = inspect(capsys, words_of(tmp_path, LONE, row="d.jsonl:6 (rejected)", loss_type="bco"))
    assert "Not trained on: empty_completion" in lost


def test_held_out_answers_and_what_training_has_of_them(capsys, tmp_path):
    held_out = write_jsonl(tmp_path / "test.jsonl", [chat_row("q1?", "new", "newer"), LONE[3]])
    text = inspect(
        capsys, words_of(tmp_path, LONE[:3], eval_dataset=held_out, num_rows=0, loss_type="bco")
    )
    # Plain text and a rendered chat are different prompts.
    assert line(text, "held out")[1:] == ["0", "0", "0 (0.0%)"]
    text = inspect(
        capsys, words_of(tmp_path, LONE[:4], eval_dataset=held_out, num_rows=0, loss_type="bco")
    )
    assert line(text, "held out")[1:] == ["0", "1", "0 (0.0%)"]


def test_tokens_of_single_answers_are_cached_apart(capsys, tmp_path):
    words = words_of(tmp_path, make_pairs(6))
    assert main(["data", "tokenize", *words]) == 0
    assert "tokenised, 6 rows" in capsys.readouterr().out
    words += ["--loss_type", "bco"]
    assert main(["data", "tokenize", *words]) == 0
    assert "tokenised, 12 rows" in capsys.readouterr().out
    assert main(["data", "tokenize", *words]) == 0
    assert "found in the cache, 12 rows" in capsys.readouterr().out


def test_score_reads_pairs_only(capsys, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", LONE)
    settings = tiny_settings(tmp_path)
    words = {key: settings[key] for key in ("model_name_or_path", "cache_dir", "progress")}
    assert main(["score", *arguments(words | {"dataset_name": data})]) == 2
    assert "d.jsonl:1 of dataset" in (error := capsys.readouterr().err)
    assert "'completion') and no 'chosen', and the loss reads pairs" in error


def test_tokenize_without_a_cache_is_refused(capsys, tmp_path):
    words = words_of(tmp_path, ROWS[:2], dataset_cache_mode="off")
    assert main(["data", "tokenize", *words]) == 2
    assert "no cache to fill" in capsys.readouterr().err
