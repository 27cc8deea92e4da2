"""Stage sft in whole: against transformers' own loss, cut in any way, resumed, evaluated."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from preftune import train
from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.cli.main import main
from preftune.data.pairs import load_pairs
from preftune.losses import NegativeLogLikelihood
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import choose_layout, use_layout
from preftune.objective import AnswerObjective
from tests.runs import (
    SHAPES,
    arguments,
    pretend_unfinished,
    read_metrics,
    tiny_config,
    tiny_settings,
)
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl


def conversations(number: int = 21, seed: int = 0) -> list[dict[str, Any]]:
    """One turn to three, of very different lengths; every fifth is a prompt and its completion."""
    rows = []
    for i, pair in enumerate(make_pairs(number, seed=seed)):
        messages = [*pair["prompt"], *pair["chosen"]]
        for turn in range(i % 3):
            asked = {"role": "user", "content": f"And then, {turn}?"}
            messages += [asked, *pair["rejected"]]
        if i % 5 == 4:
            rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
        else:
            rows.append({"messages": messages})
    return rows


def rows_of(root: Path, **columns: Any) -> Path:
    return write_jsonl(root / "sft.jsonl", [row | columns for row in conversations()])


def run(root: Path, name: str, **settings: Any) -> list[dict[str, float]]:
    options = {"stage": "sft", "dataset_name": root / "sft.jsonl", "output_dir": root / name}
    train(tiny_config(root, **options | settings))
    return read_metrics(root / name)


def transformers_loss(model: Any, examples: Any) -> torch.Tensor:
    """Cross-entropy with labels of -100 outside the assistant's turns, over the tokens that count.

    A conversation at a time; transformers' own loss would round the logits to fp32. The
    assistant's turns are read off the rendered conversations: from after its header through its
    stop token.
    """
    tokenizer = tiny_tokenizer()
    header = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    total, number = torch.zeros((), dtype=torch.float64), 0
    for messages, last_only in examples:
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        labels = [-100] * len(ids)
        starts = [i for i in range(len(ids)) if ids[i : i + len(header)] == header]
        for start in starts[-1:] if last_only else starts:
            first = start + len(header)
            end = ids.index(stop, first) + 1
            labels[first:end] = ids[first:end]
        logits, target = model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:])
        total = total + cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        number += sum(label != -100 for label in labels)
    return total / number


@pytest.mark.parametrize("name", ["shared_prefix", "concatenated"])
def test_loss_and_gradient_are_those_of_transformers(tmp_path, name):
    """In fp64, over all rows as one batch."""
    raw = conversations(9)
    dataset = load_pairs(
        str(write_jsonl(tmp_path / "rows.jsonl", raw)),
        tokenizer=tiny_tokenizer(),
        kind="supervised",
    )
    rows = [(r.get("messages") or r["prompt"] + r["completion"], "prompt" in r) for r in raw]
    model = tiny_model().double()
    expected = transformers_loss(model, rows)
    expected.backward()
    norms = {k: p.grad.norm() for k, p in model.named_parameters() if p.grad is not None}

    policy = PolicyModel(tiny_model().double())
    use_layout(policy, choose_layout(policy, name, "auto", 512))
    numbers = dataset.examples.num_scored[:, 0]
    layout = Layout(name, policy.limits)
    batcher = RowBatcher(
        dataset.examples, None, layout, torch.device("cpu"), trained_tokens=numbers
    )
    everything = range(len(numbers))
    assert batcher.num_terms(everything) == numbers.sum() < dataset.examples.lengths[:, 1].sum()
    output = AnswerObjective(NegativeLogLikelihood())(policy, batcher(everything))
    loss = output.loss_sum / batcher.num_terms(everything)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    metric = output.metrics["loss"]
    assert float(metric.total / metric.count) == pytest.approx(expected.item(), rel=1e-10)
    assert len(norms) == len(list(policy.parameters()))
    for key, parameter in policy.model.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.norm()) == pytest.approx(float(norms[key]), rel=1e-8), key


def test_how_a_batch_is_cut_changes_nothing(tmp_path):
    """And the first line is the mean over the tokens of its rows: no mean of means."""
    rows_of(tmp_path)
    options = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": None}
    runs = [run(tmp_path, name, **options, **shape) for name, shape in SHAPES.items()]
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for expected, got in zip(runs[0], other, strict=True):
            ignored = {"num_tokens"}
            for key in expected.keys() - ignored:
                assert got[key] == pytest.approx(expected[key], rel=1e-5), key
    for line in runs[0]:
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert not [key for key in line if key.startswith(("rewards", "logps", "logratios"))]


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    rows_of(tmp_path)
    options = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None, "logging_steps": 2}
    options |= {"test_size": 4, "eval_steps": 2, "metric_for_best_model": "eval/perplexity"}
    lines = run(tmp_path, "run", **options)
    assert lines[-1]["eval/loss"] < lines[1]["eval/loss"]
    assert lines[-1]["eval/perplexity"] == pytest.approx(math.exp(lines[-1]["eval/loss"]))
    assert [key for key in lines[-1] if key.startswith("eval/")] == ["eval/loss", "eval/perplexity"]
    pretend_unfinished(tmp_path / "run", after=2)
    assert run(tmp_path, "run", **options) == lines
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["best_checkpoint"]["metric"] == "eval/perplexity"
    assert "reference" not in manifest
    assert not (tmp_path / "cache" / "reference").exists()
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "after supervised fine-tuning" in card
    assert "rows each" in card


def test_a_weight_scales_a_row_and_leaves_the_divisor(tmp_path):
    rows_of(tmp_path)
    plain = run(tmp_path, "plain", max_train_steps=1, num_epochs=None)[0]
    rows_of(tmp_path, weight=0.5)
    half = run(tmp_path, "half", max_train_steps=1, num_epochs=None)[0]
    assert half["loss"] == pytest.approx(plain["loss"] / 2)
    assert half["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-5)
    assert half["perplexity"] == pytest.approx(plain["perplexity"])


def test_an_adapter_is_trained_and_its_base_is_not(tmp_path):
    rows_of(tmp_path)
    lines = run(tmp_path, "run", use_lora=True, lora_r=4, learning_rate=1e-2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    final = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in final.items() if "lora_B" in key)


def test_check_and_inspect_know_the_stage(tmp_path, capsys):
    rows_of(tmp_path)
    settings = tiny_settings(tmp_path, stage="sft", dataset_name=tmp_path / "sft.jsonl")
    assert main(["check", *arguments(settings)]) == 0
    said = capsys.readouterr().out
    assert "rows a step: 8" in said
    assert "tokens of a prompt and its answer" in said
    assert main(["data", "inspect", *arguments(settings)]) == 0
    said = capsys.readouterr().out
    assert "answer:" in said
    assert "trained" in said
    assert "Labels" not in said
    assert "other label" not in said
    assert "proof fails" not in said
