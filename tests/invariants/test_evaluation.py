"""Evaluation in whole runs: by source, by hand; samples, early stopping, and what they cost."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune import train
from preftune.errors import ConfigError
from preftune.evaluation import held_out
from tests.runs import pretend_unfinished, read_metrics, read_state, tiny_config
from tests.tiny import IM_END, make_pairs, tiny_model, tiny_tokenizer, write_jsonl

SOURCES = ("maths/hard", "chat", "chat")
SAMPLED = {"sample_steps": 2, "num_samples": 3, "sample_max_new_tokens": 7, "eval_kl_samples": 5}
STEPS = {"num_epochs": None, "max_train_steps": 4, "eval_steps": 1, "checkpointing_steps": 1}
ALL = STEPS | {"keep_last_n_checkpoints": None, "learning_rate": 1e-2}


def settings(root: Path, **options: Any):
    rows = [row | {"source": SOURCES[i % 3]} for i, row in enumerate(make_pairs(11, seed=9))]
    held = write_jsonl(root / "held_out.jsonl", rows)
    return tiny_config(root, **(ALL | {"eval_dataset": held} | options))


def with_dropout(root: Path) -> Path:
    """So that training draws random numbers."""
    tiny_model(attention_dropout=0.3).save_pretrained(root / "dropout")
    tiny_tokenizer().save_pretrained(root / "dropout")
    return root / "dropout"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without samples, and the same with them (`sampled`)."""
    root = tmp_path_factory.mktemp("evaluated")
    options = {"model_name_or_path": with_dropout(root), "disable_dropout": False}
    train(settings(root, **options))
    train(settings(root, **options, **SAMPLED, output_dir=root / "sampled"))
    return root


def sums(model: Any, row: dict[str, Any], side: str) -> tuple[float, int]:
    """Log-prob of an answer and its tokens: one unpadded forward, summed in fp64."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    first = tokenizer(prompt).input_ids
    answer = tokenizer(row[side][0]["content"] + IM_END).input_ids
    ids = torch.tensor([[*first, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, len(first) - 1 : -1].double().log_softmax(-1)
    return logps.gather(1, ids[0, len(first) :, None]).sum().item(), len(answer)


def test_each_source_by_hand(plain):
    """Loss, accuracy, margin and length-matched accuracy of the rows of a source alone."""
    last = read_metrics(plain / "run")[-1]
    policy = AutoModelForCausalLM.from_pretrained(plain / "run" / "final").eval()
    reference = AutoModelForCausalLM.from_pretrained(plain / "dropout").eval()
    rows = [json.loads(line) for line in (plain / "held_out.jsonl").read_text().splitlines()]
    found: dict[str, list[tuple[float, bool]]] = {}
    for row in rows:
        (chosen, long), (rejected, short) = (sums(policy, row, s) for s in ("chosen", "rejected"))
        chosen -= sums(reference, row, "chosen")[0]
        rejected -= sums(reference, row, "rejected")[0]
        matched = abs(long - short) <= 0.1 * max(long, short)
        found.setdefault(row["source"], []).append((0.1 * (chosen - rejected), matched))
    assert set(found) == {"maths/hard", "chat"}
    for name, pairs in found.items():
        margins = [margin for margin, _ in pairs]
        at = f"eval/source/{name}"
        mean = sum(margins) / len(margins)
        assert last[f"{at}/rewards/margins"] == pytest.approx(mean, abs=1e-5)
        loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
        assert last[f"{at}/loss"] == pytest.approx(loss, abs=1e-5)
        right = sum(margin > 0 for margin in margins) / len(margins)
        assert last[f"{at}/rewards/accuracies"] == right
        matched = [margin > 0 for margin, is_matched in pairs if is_matched]
        assert last[f"{at}/rewards/length_matched"] == pytest.approx(len(matched) / len(pairs))
        if matched:
            expected = sum(matched) / len(matched)
            assert last[f"{at}/rewards/accuracies_length_matched"] == pytest.approx(expected)
    counts = {name: len(pairs) for name, pairs in found.items()}
    whole = sum(counts[n] * last[f"eval/source/{n}/rewards/margins"] for n in counts) / len(rows)
    assert last["eval/rewards/margins"] == pytest.approx(whole, abs=1e-9)


def test_only_the_largest_of_many_sources_have_metrics(monkeypatch):
    monkeypatch.setattr(held_out, "MOST_SOURCES", 2)
    names = held_out.np.array(["b", "a", "c", "c", "b", "c"], object)
    found = held_out.rows_by_source(names)
    assert {name: rows.tolist() for name, rows in found.items()} == {"c": [2, 3, 5], "b": [0, 4]}
    assert held_out.rows_by_source(names[2:4]) == {}


def test_sampling_changes_no_number_of_training(plain):
    """Training draws random numbers here (dropout); the weights are the same to the bit, too."""
    without, sampled = read_metrics(plain / "run"), read_metrics(plain / "sampled")
    assert [{k: v for k, v in x.items() if "/kl/" not in k} for x in sampled] == without
    assert all("eval/kl/forward" in line for line in sampled)
    final = [load_file(plain / run / "final" / "model.safetensors") for run in ("run", "sampled")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_what_is_sampled(plain):
    lines = [
        json.loads(line) for line in (plain / "sampled/samples.jsonl").read_text().splitlines()
    ]
    rows = ["held_out.jsonl:1", "held_out.jsonl:6", "held_out.jsonl:11"]
    assert [(line["step"], line["row_id"]) for line in lines] == [
        (s, r) for s in (2, 4) for r in rows
    ]
    model = AutoModelForCausalLM.from_pretrained(plain / "dropout").eval()
    after = AutoModelForCausalLM.from_pretrained(plain / "sampled" / "final").eval()
    tokenizer = tiny_tokenizer()
    pairs = [json.loads(line) for line in (plain / "held_out.jsonl").read_text().splitlines()]
    for line, number in zip(lines[3:], (0, 5, 10), strict=True):
        row = pairs[number]
        assert line["chosen"] == row["chosen"][0]["content"]
        assert row["prompt"][0]["content"] in line["prompt"]
        assert line["source"] == row["source"]
        for name, of in (("start", model), ("policy", after)):
            assert line[name] == greedy(of, tokenizer, row["prompt"], 7), name
    assert any(line["start"] != line["policy"] for line in lines)


def greedy(model: Any, tokenizer: Any, prompt: Any, number: int) -> str:
    """Token by token, without a cache or padding."""
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text).input_ids
    start = len(ids)
    for _ in range(number):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_stopped_run_samples_each_step_once(plain, tmp_path, is_kept):
    """Also where the answers of the start are lost: they are made again before the restore."""
    run = tmp_path / "run"
    shutil.copytree(plain / "sampled", run)
    pretend_unfinished(run, 3)
    started = (run / "start_answers.json").read_text()
    if not is_kept:
        (run / "start_answers.json").write_text(started[:-20])
    options = {"model_name_or_path": plain / "dropout", "disable_dropout": False}
    train(settings(plain, **options, **SAMPLED, output_dir=run))
    for name in ("samples.jsonl", "start_answers.json"):
        assert (run / name).read_text() == (plain / "sampled" / name).read_text()
    assert read_metrics(run) == read_metrics(plain / "sampled")


def test_costs_are_told_and_add_up_over_resumes(plain, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(plain / "sampled", run)
    pretend_unfinished(run, 3)
    manifest = json.loads((run / "run.json").read_text())
    seconds = {"evaluation": {"seconds": 1000.0}, "sampling": {"seconds": 3000.0}}
    (run / "run.json").write_text(json.dumps(manifest | {"costs": seconds, "seconds": 10000.0}))
    options = {"model_name_or_path": plain / "dropout", "disable_dropout": False}
    progress = {"progress": "plain", "output_dir": run}
    after = train(settings(plain, **options, **SAMPLED, **progress)).manifest
    for kind, share in (("evaluation", 0.1), ("sampling", 0.3)):
        assert after["costs"][kind]["share"] == pytest.approx(share, abs=0.02)
        assert after["costs"][kind]["seconds"] > seconds[kind]["seconds"]
    told = capsys.readouterr().err
    assert "evaluation 100" in told
    assert f"of the run's {after['seconds']:.1f} s" in told


NEVER_BETTER = {"metric_for_best_model": "eval/loss", "early_stopping_threshold": 100.0}
"""The first evaluation is better than none, and no later one than it."""


@pytest.mark.parametrize("patience", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_gets_no_better_stops_and_stays_finished(plain, tmp_path, patience, capsys):
    options = NEVER_BETTER | {"early_stopping_patience": patience, "output_dir": tmp_path / "run"}
    result = train(settings(plain, **options, progress="plain"))
    run, last = tmp_path / "run", patience + 1
    assert [line["step"] for line in read_metrics(run)] == list(range(1, last + 1))
    assert result.manifest["status"] == "finished"
    assert result.manifest["early_stopping"]["step"] == result.manifest["final_step"] == last
    assert f"stopped early, after step {last} of 4: eval/loss was not" in capsys.readouterr().err
    assert f"| Steps | {last}, " in (run / "final" / "README.md").read_text()
    # Killed before final/ was written, and before the checkpoint of the last step was.
    metrics, final = read_metrics(run), (run / "final" / "model.safetensors").read_bytes()
    for after in (last, last - 1):
        pretend_unfinished(run, after)
        train(settings(plain, **options))
        assert read_metrics(run) == metrics
        assert (run / "final" / "model.safetensors").read_bytes() == final
    assert (
        read_state(run / f"checkpoints/step-{last:08d}")["early_stopping"]["num_waited"] == patience
    )


def test_a_run_that_gets_better_is_not_stopped(plain, tmp_path):
    options = {"metric_for_best_model": "eval/source/chat/loss", "early_stopping_patience": 1}
    result = train(settings(plain, **options, learning_rate=1e-3, output_dir=tmp_path / "run"))
    losses = [line["eval/source/chat/loss"] for line in read_metrics(tmp_path / "run")]
    assert losses == sorted(losses, reverse=True)
    assert "early_stopping" not in result.manifest
    assert result.manifest["best_checkpoint"]["step"] == result.manifest["final_step"] == 4


def test_final_holds_the_best_weights_where_they_are_asked_for(plain, tmp_path):
    """By a measure that gets worse with every step, so the first is the best."""
    worse = {"metric_for_best_model": "eval/loss", "greater_is_better": True}
    options = worse | {"load_best_model_at_end": True, "output_dir": tmp_path / "run"}
    result = train(settings(plain, **options, learning_rate=1e-3))
    losses = [line["eval/loss"] for line in read_metrics(tmp_path / "run")]
    assert max(losses) == losses[0]
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    best, last = (
        load_file(tmp_path / "run" / f"checkpoints/step-0000000{step}" / "model.safetensors")
        for step in (1, 4)
    )
    assert result.manifest["final_step"] == 1
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final)


def test_evaluation_before_the_first_step(plain, tmp_path):
    """A line of step 0, of the reference itself; the rest of the run is as without."""
    options = {"model_name_or_path": plain / "dropout", "disable_dropout": False}
    train(settings(plain, **options, eval_on_start=True, output_dir=tmp_path / "run"))
    first, *rest = read_metrics(tmp_path / "run")
    assert first["step"] == 0
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rest == read_metrics(plain / "run")


def test_supervised_runs_sample_too(plain, tmp_path):
    """Without rows to evaluate on: the prompts are those that are trained on."""
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in make_pairs(6, seed=3)]
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    options = {"stage": "sft", "dataset_name": data, "sample_steps": 0.5, "num_samples": 2}
    options |= {"sample_max_new_tokens": 3, "eval_dataset": None, "eval_steps": None}
    train(settings(plain, **options, output_dir=tmp_path / "run"))
    lines = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["dataset"]) for line in lines] == [
        (s, "train") for s in (2, 2, 4, 4)
    ]
    assert lines[0]["chosen"] == rows[0]["messages"][-1]["content"]


def test_prompts_that_leave_no_room_are_told_before_weights_load(plain, tmp_path):
    options = {"sample_steps": 1, "sample_max_new_tokens": 510, "output_dir": tmp_path / "run"}
    with pytest.raises(ConfigError, match=r"sample_max_new_tokens is 510.*in the 512 tokens"):
        train(settings(plain, **options))
    assert not (tmp_path / "run").exists()
