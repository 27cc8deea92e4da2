"""`preftune plan`: what it says of tiny models, with and without rows, and of mistakes."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from preftune.cli.main import main
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    tiny_model().config.save_pretrained(root / "model")  # no weights are needed
    tiny_tokenizer().save_pretrained(root / "model")
    write_jsonl(root / "train.jsonl", make_pairs(12))
    return root


def words(root: Path, *more: str) -> list[str]:
    return [
        "plan",
        *("--model_name_or_path", str(root / "model")),
        *("--dataset_name", str(root / "train.jsonl")),
        *("--cache_dir", str(root / "cache"), "--output_dir", str(root / "run")),
        *more,
    ]


def planned(capsys, argv: list[str]) -> dict:
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows_and_parts_of_a_tiny_run(capsys, files):
    found = planned(capsys, words(files, "--device", "H100", "--per_device_train_batch_size", "4"))
    number = sum(p.numel() for p in tiny_model().parameters())
    assert found["parameters"]["total"] == found["parameters"]["trainable"] == number
    assert found["steps"] == 3
    assert found["heaviest_micro_batch"]["rows"] == 4
    assert not found["rows_are_worst_case"]
    phases = found["bytes_by_phase_and_part"]
    assert found["peak_bytes"] == max(sum(parts.values()) for parts in phases.values())
    assert found["peak_bytes"] == sum(phases[found["peak_phase"]].values())
    step = phases["forward and backward"]
    assert step["optimizer"] == pytest.approx(8 * number, rel=0.01)
    assert step["weights"] == pytest.approx(4 * number, rel=0.01)
    assert found["disk_bytes"]["checkpoint"] == pytest.approx(12 * number, rel=0.01)
    assert found["disk_bytes"]["num_checkpoints"] == 4
    assert found["time"]["is_estimate"]
    assert found["fits"]
    assert found["change"] is None
    assert not (files / "run").exists()


def test_the_text_fits_a_terminal_and_says_what_is_assumed(capsys, files):
    assert main(words(files, "--device", "a100-80", "--use_lora", "true")) == 0
    text = capsys.readouterr().out
    assert "fits: " in text
    assert "35% of 312 TFLOP/s a\n" in text or "35% of 312 TFLOP/s" in " ".join(text.split())
    assert "adapters of q_proj: " in text
    lines = [line for line in text.splitlines() if not line.startswith(("model ", "note"))]
    assert max(map(len, lines)) <= 80


def test_a_rate_that_was_measured(capsys, files, tmp_path):
    lines = [{"step": i, "perf/tokens_per_second": rate} for i, rate in enumerate((10, 100, 120))]
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    found = planned(capsys, words(files, "--device", "cpu", "--measured_run", str(tmp_path)))
    assert found["time"]["tokens_per_second"] == 100
    assert not found["time"]["is_estimate"]
    seconds = found["time"]["step_seconds"] * found["steps"]
    assert found["time"]["total_seconds"] == pytest.approx(seconds)


def test_rows_that_cannot_be_read_here_are_taken_at_their_longest(capsys, files):
    argv = words(files, "--device", "H100", "--max_length", "100")
    argv[argv.index(str(files / "train.jsonl"))] = "someone/pairs"
    found = planned(capsys, [*argv, "--per_device_train_batch_size", "2"])
    assert found["rows_are_worst_case"]
    # A prompt of one token, and two answers that fill the rest.
    assert found["heaviest_micro_batch"] == {"rows": 2, "tokens": 2 * (1 + 2 * 99), "in_step": 1}
    assert found["steps"] is None
    assert found["time"]["total_seconds"] is None
    assert "100 tokens a side" in found["notes"][0]


def test_what_does_not_fit_is_told_with_the_smallest_change(capsys, files):
    argv = words(files, "--device_memory_gib", "0.6301", "--per_device_train_batch_size", "8")
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "does not fit: " in text
    flags = text[text.index("the smallest change") :].splitlines()[1].split()
    found = planned(capsys, [*argv, *flags])
    assert found["fits"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--device", "H1000"], "--device is 'H1000'; it must be cpu or one of T4, "),
        (["--device_memory_gib", "-1"], "--device_memory_gib is -1.0; it must be above 0"),
        (["--num_processes", "0"], "--num_processes is 0; it must be 1 or more"),
        (["--mfu", "2"], "--mfu is 2.0; it is a share: at most 1"),
        (["--measured_run", "/nowhere"], "there is no metrics.jsonl in it"),
        (["--tokens_per_second", "5", "--mfu", "0.5"], "the rate is given, so nothing reads it"),
        (["--sequence_parallel_size", "3"], "it must divide num_processes, which is 1"),
        (["--dataset_name", "./absent.jsonl"], "no such file or folder"),
        (["--model_name_or_path", "./absent"], "'./absent'"),
        (
            ["--use_lora", "true", "--lora_target_modules", "x_proj"],
            "no layer's whole name matches",
        ),
        (["--bata", "1"], "--bata is not an option; did you mean --beta?"),
    ],
)
def test_mistakes(capsys, files, more, told):
    argv = words(files)
    for key, value in zip(more[::2], more[1::2], strict=True):
        argv += [key, value]
    if "--dataset_name" in more or "--model_name_or_path" in more:
        first = argv.index(more[0])
        del argv[first : first + 2]
    assert main(argv) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_no_limit_of_length_and_no_rows(capsys, files, tmp_path):
    LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64
    ).save_pretrained(tmp_path)  # no tokenizer, so no rows
    argv = words(files, "--max_length", "null", "--device", "T4")
    argv[2] = str(tmp_path)
    found = planned(capsys, argv)
    assert found["rows_are_worst_case"]
    assert found["heaviest_micro_batch"]["tokens"] % (1 + 2 * 63) == 0
    assert found["device"]["precision"] == "fp16"
