"""fp16 products: the steps of PyTorch's GradScaler, and what becomes of gradients that overflow."""

import json
import math
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from preftune import ExperimentConfig, train
from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.cli.main import main
from preftune.config.distributed import DistributedConfig
from preftune.config.score import ScoreConfig
from preftune.config.training import TrainingConfig
from preftune.distributed.engine import TorchEngine
from preftune.distributed.runtime import Runtime
from preftune.errors import ConfigError, TrainingDiverged
from preftune.losses import DPO
from preftune.model.forward import PolicyModel
from preftune.objective import PairObjective
from preftune.training import loss_scale
from preftune.training.optimizer import make_optimizer
from preftune.training.step import TrainState, train_step
from tests.examples import make_examples
from tests.runs import (
    arguments,
    pretend_unfinished,
    read_metrics,
    read_state,
    tiny_config,
    tiny_settings,
)
from tests.tiny import make_pairs, tiny_model, write_jsonl

BETA, MAX_NORM, PATIENCE, BATCH = 0.5, 0.5, 3, 4
OVERFLOWS = 2.0**23
"""A scale under which every gradient overflows, and so do those of many smaller ones."""
EXAMPLES = make_examples(4 * BATCH, seed=5, prompt=(1, 12), completion=(1, 20))
STEPS = 16
RATES = {"sgd": 0.5, "adamw": 1e-3}


class Steps:
    """What a training did, step by step."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        """After each step."""
        self.norms: list[float] = []
        """Before clipping, without the scale."""
        self.weights = torch.empty(0)


def rows_of(step: int) -> range:
    first = step * BATCH % len(EXAMPLES)
    return range(first, first + BATCH)


def plain_logp(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).double().sum()


def reference() -> Tensor:
    """Of another model than the policy."""
    other = tiny_model(seed=1)
    with torch.no_grad():
        return torch.stack(
            [
                torch.stack([plain_logp(other, x.prompt_ids, c.ids) for c in x.completions])
                for x in EXAMPLES
            ]
        )


def by_pytorch(optimizer: str) -> Steps:
    """A plain loop: the model's own forward, row by row, and `torch.amp.GradScaler`."""
    model, ref, seen = tiny_model(), reference(), Steps()
    weights = list(model.parameters())
    if optimizer == "sgd":
        update: Any = torch.optim.SGD(weights, lr=RATES["sgd"])
    else:
        update = torch.optim.AdamW(weights, lr=RATES["adamw"], weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWS, growth_interval=PATIENCE)
    for step in range(STEPS):
        for row in rows_of(step):
            example = EXAMPLES[row]
            with torch.autocast("cpu", torch.float16):
                chosen, rejected = (
                    plain_logp(model, example.prompt_ids, c.ids) for c in example.completions
                )
            margin = (chosen - ref[row, 0]) - (rejected - ref[row, 1])
            scaler.scale(-logsigmoid(BETA * margin) / BATCH).backward()
        scaler.unscale_(update)
        seen.norms.append(float(torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)))
        scaler.step(update)
        scaler.update()
        update.zero_grad()
        seen.scales.append(scaler.get_scale())
    seen.weights = torch.cat([p.detach().flatten() for p in weights])
    return seen


def by_us(optimizer: str) -> Steps:
    runtime, seen = Runtime("fp16", seed=0), Steps()
    policy = PolicyModel(tiny_model())
    config = TrainingConfig(optimizer=optimizer, learning_rate=RATES[optimizer])  # type: ignore[arg-type]
    make = partial(make_optimizer, config=config)
    engine = runtime.spread(policy, make, DistributedConfig(), max_grad_norm=MAX_NORM)
    state = TrainState.at_start(engine, runtime.device, precision="fp16")
    assert state.loss_scale is not None
    batcher = RowBatcher(EXAMPLES, reference(), Layout("concatenated"), runtime.device)
    objective = PairObjective(DPO(beta=BETA))
    for step in range(STEPS):
        rows = rows_of(step)
        micro_batches = [batcher(rows[:1]), batcher(rows[1:])]
        rate = RATES[optimizer]
        train_step(state, micro_batches, objective, runtime, num_rows=BATCH, learning_rate=rate)
        means = state.window.means(runtime.all_reduce)
        state.window.clear()
        seen.norms.append(means.get("grad_norm", math.inf))
        seen.scales.append(float(state.loss_scale.value))
    seen.weights = torch.cat([p.detach().flatten() for p in policy.parameters()])
    return seen


def start_at(monkeypatch: pytest.MonkeyPatch, scale: float, patience: int = PATIENCE) -> None:
    monkeypatch.setattr(loss_scale, "START", scale)
    monkeypatch.setattr(loss_scale, "PATIENCE", patience)


def check_same_steps(ours: Steps, theirs: Steps) -> None:
    assert ours.scales == theirs.scales
    assert [math.isfinite(x) for x in ours.norms] == [math.isfinite(x) for x in theirs.norms]
    finite = [(x, y) for x, y in zip(ours.norms, theirs.norms, strict=True) if math.isfinite(x)]
    for one, other in finite:
        # Rounding: ours applies the scale after the head's products, in fp32.
        assert one == pytest.approx(other, rel=2e-3)
    moved = float((theirs.weights - start_weights()).norm())
    assert float((ours.weights - theirs.weights).norm()) < 0.01 * moved


def start_weights() -> Tensor:
    return torch.cat([p.detach().flatten() for p in tiny_model().parameters()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_are_those_of_pytorchs_grad_scaler(monkeypatch, optimizer):
    """The first ones overflow; later the scale doubles until one overflows again.

    AdamW would hide gradients of another length, SGD does not.
    """
    start_at(monkeypatch, OVERFLOWS)
    theirs = by_pytorch(optimizer)
    finite = [math.isfinite(norm) for norm in theirs.norms]
    assert not any(finite[:3])
    assert not all(finite[finite.index(True) :])
    assert any(b > a for a, b in pairwise(theirs.scales))
    assert max(norm for norm in theirs.norms if math.isfinite(norm)) > MAX_NORM
    check_same_steps(by_us(optimizer), theirs)
    if optimizer == "adamw":
        return
    for mutant in (clipped_before, updated_with_the_scale, skipped_nothing):
        with monkeypatch.context() as patch:
            mutant(patch)
            with pytest.raises(AssertionError):
                check_same_steps(by_us(optimizer), theirs)


def clipped_before(patch: pytest.MonkeyPatch) -> None:
    """Mutant: `max_grad_norm` of the scaled gradient."""
    patch.setattr(TorchEngine, "_unscaled", lambda self, norm: norm)


def updated_with_the_scale(patch: pytest.MonkeyPatch) -> None:
    """Mutant: the optimizer sees the scaled gradient."""
    update = TorchEngine.update

    def scaled(self: TorchEngine, *, skip: Tensor) -> None:
        self.loss_scale = None
        update(self, skip=skip)

    patch.setattr(TorchEngine, "update", scaled)


def skipped_nothing(patch: pytest.MonkeyPatch) -> None:
    """Mutant: an overflow updates the weights."""
    update = TorchEngine.update
    patch.setattr(
        TorchEngine, "update", lambda self, skip: update(self, skip=torch.zeros_like(skip))
    )


FP16 = {"mixed_precision": "fp16", "checkpointing_steps": 1, "keep_last_n_checkpoints": None}


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """The scale has fallen by then, and has begun to count towards its next rise."""
    start_at(monkeypatch, 2.0**20, patience=2)
    options = FP16 | {"num_epochs": 3.0, "logging_steps": 2}
    straight = train(tiny_config(tmp_path, **options)).folder
    lines = read_metrics(straight.root)
    scales = [line["loss_scale"] for line in lines]
    assert scales[0] < 2.0**20
    assert any(b > a for a, b in pairwise(scales))
    assert lines[-1]["overflow_steps"] >= 2
    states = {step: read_state(straight.checkpoint(step))["loss_scale"] for step in range(1, 10)}
    counting = [step for step, state in states.items() if state["good_steps"] == 1]
    for step in {3, counting[-1]}:  # 3: inside a window
        target = tmp_path / f"stopped-{step}"
        shutil.copytree(straight.root, target)
        pretend_unfinished(target, step)
        train(tiny_config(tmp_path, output_dir=target, **options))
        assert read_metrics(target) == lines
        final = "final/model.safetensors"
        one, other = load_file(straight.root / final), load_file(target / final)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_that_overflows_changes_the_scale_alone(tmp_path, monkeypatch):
    """Not the weights, moments and counted steps; the schedule goes on. No batch is at fault."""
    start_at(monkeypatch, 2.0**30)
    result = train(tiny_config(tmp_path, **FP16, max_train_steps=4, num_epochs=None))
    assert result.manifest["skipped_batches"] == []
    folder, lines = result.folder, read_metrics(result.folder.root)
    assert [line["loss_scale"] for line in lines] == [2.0**29, 2.0**28, 2.0**27, 2.0**26]
    assert [line["overflow_steps"] for line in lines] == [1, 2, 3, 4]
    assert not any("loss" in line or "grad_norm" in line for line in lines)
    assert len({line["learning_rate"] for line in lines}) > 1
    for name in ("model", "optimizer"):
        first, last = (
            load_file(folder.checkpoint(step) / f"{name}.safetensors") for step in (1, 4)
        )
        assert all(torch.equal(first[key], last[key]) for key in first)
        if name == "optimizer":
            assert all(not tensor.any() for tensor in last.values())


def exploding(root: Path) -> Path:
    """A pair that weighs so much that its gradient exceeds fp32 under any scale."""
    rows = make_pairs(21, seed=0)
    rows[3]["weight"] = 1e300
    return write_jsonl(root / "exploding.jsonl", rows)


def test_at_its_smallest_the_scale_is_not_at_fault(tmp_path, monkeypatch, capsys):
    start_at(monkeypatch, 2.0)
    settings = tiny_settings(tmp_path, dataset_name=exploding(tmp_path), **FP16)
    assert main(["train", *arguments(settings)]) == 3
    error = capsys.readouterr().err
    assert "the loss or gradient of step 4 is not finite" in error
    assert "or mixed_precision bf16 or fp32, whose numbers reach further than fp16's" in error
    lines = read_metrics(tmp_path / "run")
    # The pair is in steps 2 and 4.
    assert [(line["loss_scale"], line["overflow_steps"]) for line in lines] == [
        (2.0, 0),
        (1.0, 1),
        (1.0, 1),
    ]
    saved = read_state(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert saved["loss_scale"] == {"value": 1.0, "good_steps": 1, "num_skipped": 1}
    skipping = settings | {"on_nonfinite": "skip_batch", "output_dir": str(tmp_path / "skips")}
    assert main(["train", *arguments(skipping)]) == 0
    manifest = json.loads((tmp_path / "skips" / "run.json").read_text())
    assert [entry["step"] for entry in manifest["skipped_batches"]] == [4]


def test_a_loss_that_is_not_finite_is_no_fault_of_the_scale(tmp_path):
    """No scale mends it: the run stops at once, with the scale as it was."""
    options = {"optimizer": "sgd", "learning_rate": 1e38, "warmup_ratio": 0.0, "max_grad_norm": 0}
    with pytest.raises(TrainingDiverged, match="is not finite"):
        train(tiny_config(tmp_path, **FP16 | options))
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    assert read_state(last)["loss_scale"]["value"] == loss_scale.START


def test_training_evaluation_and_score_stay_near_fp32(tmp_path, capsys):
    data = write_jsonl(tmp_path / "held_out.jsonl", make_pairs(5, seed=9))
    runs = {}
    for precision in ("fp32", "fp16"):
        options = {"mixed_precision": precision, "output_dir": tmp_path / precision}
        result = train(tiny_config(tmp_path, eval_dataset=data, eval_steps=3, **options))
        assert result.manifest["precision"] == precision
        runs[precision] = read_metrics(result.folder.root)
    # Each in a namespace of its own.
    assert len(list((tmp_path / "cache" / "reference").iterdir())) == 2
    assert runs["fp16"][0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    for one, other in zip(runs["fp16"], runs["fp32"], strict=True):
        for key in set(one) & {"loss", "grad_norm", "eval/loss", "logps/chosen"}:
            assert one[key] == pytest.approx(other[key], rel=5e-3), key
            assert one[key] != other[key] or one["step"] < 3
    printed = {}
    for precision in ("fp32", "fp16"):
        words = ["--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data)]
        words += ["--reference_model_name_or_path", str(tmp_path / "fp32" / "final")]
        words += ["--mixed_precision", precision, "--cache_dir", str(tmp_path / "cache")]
        assert main(["score", *words, "--output", str(tmp_path / f"{precision}.parquet")]) == 0
        printed[precision] = capsys.readouterr().out
    assert printed["fp16"] != printed["fp32"]


@pytest.mark.parametrize("make", [ExperimentConfig, ScoreConfig])
def test_weights_are_float32(make):
    with pytest.raises(ConfigError, match="mixed_precision is 'fp16'; the weights are bfloat16"):
        make(
            model_name_or_path="m",
            dataset_name="d.jsonl",
            mixed_precision="fp16",
            dtype="bfloat16",
        )
