"""TR-DPO: a reference that runs beside the policy and follows it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune import train
from preftune.errors import CheckpointError, TrainingDiverged
from preftune.model.forward import PolicyModel
from tests.runs import read_metrics, reseal, tiny_config

SYNC = {"sync_reference": True}
OFTEN = SYNC | {"reference_sync_steps": 2, "reference_mixup_alpha": 0.5}


def run(root: Path, name: str, **settings) -> list[dict[str, float]]:
    train(tiny_config(root, output_dir=root / name, **settings))
    return read_metrics(root / name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "wpo", "forward_layout": "concatenated"},
        {"loss_type": ["ipo", "simpo"], "forward_layout": "separate"},
        {"loss_type": "aot", "max_tokens_per_microbatch": 300},
        {"loss_type": "dpo", "ld_alpha": 0.3},
        {"loss_type": "beta_dpo", "gradient_checkpointing": True},
        {"loss_type": "kto"},
        {"loss_type": "bco", "forward_layout": "concatenated"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "dpo",
)
def test_before_its_first_sync_a_run_is_that_of_the_store(tmp_path, settings):
    settings = settings | {"test_size": 5, "eval_steps": 2}
    stored = run(tmp_path, "stored", **settings)
    shutil.rmtree(tmp_path / "cache" / "reference")
    live = run(tmp_path, "live", **SYNC, **settings)
    assert not (tmp_path / "cache" / "reference").exists()
    assert "reference" not in json.loads((tmp_path / "live" / "run.json").read_text())
    assert len(live) == len(stored) > 3
    counted = ("logratios/displaced", "rewards/accuracies", "rewards/accuracies_length_matched")
    counts_of_signs = {prefix + name for prefix in ("", "eval/") for name in counted}
    assert stored[-1]["loss"] != pytest.approx(stored[0]["loss"], rel=1e-3)
    for one, other in zip(live, stored, strict=True):
        assert one.keys() == other.keys()
        for key in {"loss", "eval/loss", "grad_norm"} & one.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-5), key
        for key in one.keys() - counts_of_signs:  # where policy and reference are equal, rounding
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_a_sync_with_alpha_1_the_loss_is_ln_2(tmp_path, precision):
    """Steps 1 and 4 are trained against themselves, to the last bit in any precision."""
    settings = SYNC | {"reference_sync_steps": 3, "reference_mixup_alpha": 1.0}
    settings |= {"warmup_ratio": 0.0, "mixed_precision": precision, "test_size": 5}
    lines = run(tmp_path, "run", **settings, eval_steps=3)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        fresh = line["step"] in (1, 4)
        assert (abs(line["loss"] - math.log(2)) < 1e-12) == fresh
        assert (line["rewards/margins"] == 0) == fresh
    assert lines[2]["eval/loss"] == pytest.approx(math.log(2), abs=1e-12)
    assert lines[3]["eval/loss"] != pytest.approx(math.log(2), abs=1e-5)


def test_a_sync_shows_in_the_step_after_it(tmp_path):
    stays, follows = run(tmp_path, "stays", **SYNC), run(tmp_path, "follows", **OFTEN)
    assert follows[:2] == stays[:2]
    assert follows[2]["logps/chosen"] == stays[2]["logps/chosen"]
    # Half of the way that the policy went since it was the reference, up to curvature.
    ratio = follows[2]["logratios/chosen"] / stays[2]["logratios/chosen"]
    assert 0.4 < ratio < 0.6


@pytest.fixture
def forwards(monkeypatch) -> list[bool]:
    """Whether each forward so far kept a graph for a backward."""
    calls: list[bool] = []
    forward = PolicyModel.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    return calls


@pytest.mark.parametrize(
    ("loss_type", "step"),
    [
        ("dpo", [False, True] * 2),
        # Both models score the batch first; the second pass takes the reference's from there.
        ("aot", [False, False] * 2 + [True, True]),
    ],
)
def test_the_reference_runs_once_a_micro_batch(tmp_path, forwards, loss_type, step):
    run(tmp_path, "run", loss_type=loss_type, **SYNC)
    # Two of the layout's probe, six of the check before step 1, which runs the reference on two of
    # its four micro-batches; the heaviest micro-batch runs it, too. 21 pairs in micro-batches of 4
    # are 2, 2 and 2 a step.
    assert forwards == [False] * 8 + [False, True] + step * 6


RESUMED = OFTEN | {"test_size": 5, "eval_steps": 2, "checkpointing_steps": 1}
RESUMED |= {"keep_last_n_checkpoints": None, "logging_steps": 2, "num_epochs": 3.0}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """16 pairs in batches of 8: six steps, syncs after steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("straight")
    run(root, "run", **RESUMED)
    return root


def stop_after(straight: Path, step: int, target: Path) -> Path:
    """The run folder as a kill after that step's checkpoint leaves it; returns the checkpoint."""
    shutil.copytree(straight / "run", target)
    shutil.rmtree(target / "final")
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    manifest = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    return target / "checkpoints" / f"step-{step:08d}"


def same_run(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "final" / "model.safetensors") for folder in (one, other))
    same_weights = all(torch.equal(first[name], second[name]) for name in first)
    return same_weights and read_metrics(one) == read_metrics(other)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(straight, tmp_path, step):
    stop_after(straight, step, tmp_path / "run")
    run(straight, tmp_path / "run", **RESUMED)
    assert same_run(straight / "run", tmp_path / "run")
    last = "checkpoints/step-00000006/reference.safetensors"
    first, second = load_file(straight / "run" / last), load_file(tmp_path / "run" / last)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_reference_that_is_not_restored_is_noticed(straight, tmp_path):
    """Mutant: the run goes on against the initial reference, which step 1 still had."""
    checkpoint = stop_after(straight, 3, tmp_path / "run")
    initial = straight / "run" / "checkpoints" / "step-00000001" / "reference.safetensors"
    shutil.copyfile(initial, checkpoint / "reference.safetensors")
    reseal(checkpoint)
    run(straight, tmp_path / "run", **RESUMED)
    assert not same_run(straight / "run", tmp_path / "run")


def test_a_checkpoint_without_its_reference_is_damaged(straight, tmp_path):
    checkpoint = stop_after(straight, 3, tmp_path / "run")
    (checkpoint / "reference.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003 is damaged.*reference\.safetensors"):
        run(straight, tmp_path / "run", **RESUMED)


def test_a_sync_after_a_bad_step_is_not_in_the_state_from_before_it(tmp_path):
    """Step 2 is bad, which shows at step 4; in between, two syncs were due."""
    options = {"optimizer": "sgd", "learning_rate": 1e38, "warmup_steps": 0, "logging_steps": 4}
    with pytest.raises(TrainingDiverged, match="step 2 is not finite"):
        run(tmp_path, "run", **OFTEN, **options)
    saved = load_file(tmp_path / "run/checkpoints/step-00000001/reference.safetensors")
    initial = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], initial[name]) for name in initial)


def test_what_will_have_no_effect_is_said(tmp_path, capsys):
    run(tmp_path, "run", progress="plain", **SYNC)
    said = capsys.readouterr().err
    assert "every 512 steps it becomes 0.6 x policy + 0.4 x reference" in said
    assert "reference_sync_steps is 512, and the run has 6 steps: no step is trained" in said
