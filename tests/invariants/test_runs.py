"""What whole runs promise: counts, files, exits, evaluation."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import train
from preftune.cli.main import main
from preftune.errors import TrainingDiverged
from preftune.model.forward import PolicyModel
from tests.runs import arguments, read_metrics, tiny_config, tiny_settings
from tests.tiny import make_pairs, write_jsonl


@pytest.fixture
def forwards(monkeypatch) -> list[bool]:
    """Whether each forward of a policy so far kept a graph for a backward."""
    calls: list[bool] = []
    forward = PolicyModel.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    return calls


def test_a_run_leaves_what_the_docs_say(tmp_path):
    result = train(tiny_config(tmp_path, checkpointing_steps="epoch", test_size=5))
    run = result.folder.root
    names = sorted(p.name for p in run.iterdir())
    assert names == [
        "checkpoints",
        "config.yaml",
        "final",
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]
    assert [p.name for p in result.folder.list_checkpoints()] == ["step-00000002", "step-00000004"]
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["data"]["train"]["num_pairs"] == 16
    assert manifest["data"]["held_out"]["num_pairs"] == 5
    assert manifest["reference"]["reference"] == {"computed": 32, "reused": 0}
    first = read_metrics(run, with_perf=True)[0]
    assert next(iter(first)) == "step"
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {"rewards/margins", "grad_norm", "num_tokens", "perf/peak_memory_gib"} <= first.keys()


def test_final_loads_with_plain_transformers_and_generates(tmp_path):
    folder = train(tiny_config(tmp_path)).folder.final
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] > inputs["input_ids"].shape[1]
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers")


def test_reference_free_losses_run_no_reference_forward(tmp_path, forwards):
    manifest = train(tiny_config(tmp_path, loss_type="simpo")).manifest
    # 21 pairs in micro-batches of 4 make 6 forwards an epoch; seven more come before step 1: two of
    # the layout's probe, four of the check of that step (two rows that are scored once more, and
    # eight in micro-batches of 4), and the heaviest micro-batch, as in training.
    assert forwards == [False] * 6 + [True] * 13
    assert "reference" not in manifest
    assert not (tmp_path / "cache" / "reference").exists()


def test_what_does_not_change_the_reference_recomputes_none(tmp_path, forwards):
    train(tiny_config(tmp_path))
    forwards.clear()
    changes = {"learning_rate": 5e-4, "beta": 0.7, "output_dir": tmp_path / "b"}
    for loss_type in ("dpo", "dpo_norm"):
        options = changes | {"loss_type": loss_type, "output_dir": tmp_path / loss_type}
        manifest = train(tiny_config(tmp_path, **options)).manifest
        assert manifest["reference"]["reference"] == {"computed": 0, "reused": 42}
    assert forwards == ([False] * 6 + [True] * 13) * 2


def test_other_weights_recompute_all(tmp_path):
    train(tiny_config(tmp_path))
    result = train(tiny_config(tmp_path, output_dir=tmp_path / "b"))
    again = tiny_config(tmp_path, output_dir=tmp_path / "c", model_name_or_path=result.folder.final)
    assert train(again).manifest["reference"]["reference"] == {"computed": 42, "reused": 0}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"eval_steps": 2}, [2, 4]),
        ({"eval_steps": 0.25}, [1, 2, 3, 4]),
        ({"eval_strategy": "epoch"}, [2, 4]),
        ({"eval_strategy": "never"}, []),
    ],
)
def test_evaluation_happens_when_asked(tmp_path, options, steps):
    run = train(tiny_config(tmp_path, test_size=5, **options)).folder.root
    assert [line["step"] for line in read_metrics(run) if "eval/loss" in line] == steps


def test_held_out_metrics_equal_those_of_score(tmp_path, capsys):
    """The last evaluation of a run and `preftune score` of its model say the same."""
    held_out = write_jsonl(tmp_path / "held-out.jsonl", make_pairs(9, seed=7))
    result = train(tiny_config(tmp_path, eval_dataset=held_out, beta=0.3))
    last = read_metrics(result.folder.root)[-1]
    words = {
        "model_name_or_path": result.folder.final,
        "reference_model_name_or_path": tmp_path / "model",
        "dataset_name": held_out,
        "beta": 0.3,
        "mixed_precision": "fp32",
        "per_device_eval_batch_size": 4,
        "output": tmp_path / "scores.parquet",
        "summary": tmp_path / "summary.json",
        "progress": "none",
    }
    assert main(["score", *arguments(words)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())["total"]
    (against,) = summary["rewards"]
    rewards = against["rewards"]
    assert rewards["margin"] == pytest.approx(last["eval/rewards/margins"], abs=1e-4)
    assert rewards["accuracy"] == pytest.approx(last["eval/rewards/accuracies"], abs=1e-4)
    assert f"{rewards['margin']:.4f}" in capsys.readouterr().out
    assert summary["num_length_matched"] / summary["num_pairs"] == pytest.approx(
        last["eval/rewards/length_matched"]
    )
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    assert table["row_id"] == [f"held-out.jsonl:{line}" for line in range(1, 10)]
    margins = [c - r for c, r in zip(table["reward_chosen"], table["reward_rejected"], strict=True)]
    assert sum(margins) / 9 == pytest.approx(last["eval/rewards/margins"], abs=1e-5)


# What is no part of the numbers: tokens are counted as they are forwarded, and before the first
# step both rewards are zero, so that rounding alone decides which of them is larger.
BESIDE = ("num_tokens", "rewards/accuracies", "logratios/displaced")


@pytest.mark.parametrize("layout", ["shared_prefix", "separate"])
def test_layouts_train_the_same(tmp_path, layout):
    runs = []
    for name in (layout, "concatenated"):
        options = {"forward_layout": name, "output_dir": tmp_path / name, "logging_steps": 3}
        result = train(tiny_config(tmp_path, **options))
        assert result.manifest["layout"] == name
        lines = read_metrics(result.folder.root)
        runs.append([{k: v for k, v in line.items() if k not in BESIDE} for line in lines])
    for one, other in zip(*runs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_gradient_checkpointing_trains_the_same(tmp_path):
    runs = []
    for value in (False, True, "selective"):
        options = {"gradient_checkpointing": value, "output_dir": tmp_path / str(value)}
        runs.append(read_metrics(train(tiny_config(tmp_path, **options)).folder.root))
    for one, *others in zip(*runs, strict=True):
        for other in others:
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_bf16_products_stay_near_fp32(tmp_path):
    options = {"mixed_precision": "bf16", "output_dir": tmp_path / "bf16"}
    bf16 = read_metrics(train(tiny_config(tmp_path, **options)).folder.root)
    fp32 = read_metrics(train(tiny_config(tmp_path)).folder.root)
    assert bf16[0]["loss"] == pytest.approx(math.log(2), abs=0.02)
    assert bf16[-1]["loss"] == pytest.approx(fp32[-1]["loss"], abs=0.05)
    assert bf16 != fp32


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(tmp_path, capsys):
    settings = tiny_settings(
        tmp_path, optimizer="sgd", learning_rate=1e38, warmup_steps=0, logging_steps=2
    )
    with pytest.raises(TrainingDiverged):
        train(tiny_config(tmp_path, **settings | {"output_dir": tmp_path / "raised"}))
    assert main(["train", *arguments(settings)]) == 3
    error = capsys.readouterr().err
    assert "step 2 is not finite" in error
    assert "pairs.jsonl:" in error
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "diverged"


def test_check_on_1000_pairs_reads_no_weights(tmp_path, capsys):
    settings = tiny_settings(tmp_path)
    write_jsonl(Path(settings["dataset_name"]), make_pairs(1000))
    # Weights that cannot be read: whoever touched them would fail.
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    assert main(["check", *arguments(settings)]) == 0
    printed = capsys.readouterr().out
    assert "1000 rows read, 1000 kept" in printed
    assert "pairs a step: 8 = 4 x 2 accumulated x 1 processes" in printed
    assert "steps: 250 (125 an epoch)" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_exits_75_and_the_same_command_goes_on(tmp_path, number):
    settings = tiny_settings(tmp_path, num_epochs=60.0, learning_rate=1e-4)
    straight = settings | {"output_dir": str(tmp_path / "straight")}
    command = [sys.executable, "-m", "preftune", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*command, *arguments(settings)], env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "run the same command again to go on" in error
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert main(["train", *arguments(settings)]) == 0
    assert main(["train", *arguments(straight)]) == 0
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "straight")
