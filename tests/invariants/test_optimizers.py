"""Every optimizer: stopped and resumed is the same bits, and no step waits but bitsandbytes'."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune import train
from preftune.errors import CheckpointError
from tests.runs import pretend_unfinished, read_metrics, tiny_config
from tests.syncs import syncs_of_a_run
from tests.tiny import tiny_model, tiny_tokenizer

ROUNDED = {"stochastic_rounding": True, "dtype": "bfloat16"}
CASES = {
    "adamw_8bit": {},
    "adamw_torch_8bit": ROUNDED,
    "adamw_torch_4bit": {},
    "adafactor": ROUNDED,
    "muon": {},
    "adamw": ROUNDED,
}
STATES = {
    "adamw_8bit": {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"},
    "adamw_torch_8bit": {"step"}
    | {f"{name}.{part}" for name in ("exp_avg", "exp_avg_sq") for part in ("codes", "scales")},
    "adafactor": {"step", "exp_avg_sq_row", "exp_avg_sq_col"},
    "muon": {"step", "momentum_buffer"},
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
}
STATES["adamw_torch_4bit"] = STATES["adamw_torch_8bit"]
MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A model whose rows blocks of 64 divide."""
    root = tmp_path_factory.mktemp("optimizers")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    return root


def settings(root: Path, name: str, **overrides):
    options = {"optimizer": name, "num_epochs": None, "max_train_steps": 4, "warmup_ratio": 0.0}
    options |= {"gradient_accumulation_steps": 1, "checkpointing_steps": 1, "learning_rate": 1e-4}
    options |= {"keep_last_n_checkpoints": None, "output_dir": root / name}
    return tiny_config(root, **(options | CASES[name] | overrides))


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_to_the_same_bits(root, name):
    """Weights, and all that the optimizer keeps, by parameter name."""
    run, last = root / name, Path("checkpoints/step-00000004/optimizer.safetensors")
    train(settings(root, name))
    straight, state = load_file(run / "final/model.safetensors"), load_file(run / last)
    metrics = read_metrics(run)
    assert {k.partition("/")[0] for k in state if k.endswith("/" + MATRIX)} == STATES[name]
    pretend_unfinished(run, 2)
    train(settings(root, name))
    again, state_again = load_file(run / "final/model.safetensors"), load_file(run / last)
    assert read_metrics(run) == metrics
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    # It learns, and the state is not that of the start.
    assert metrics[-1]["rewards/margins"] != metrics[0]["rewards/margins"]
    assert float(state[f"step/{MATRIX}"]) == 4


def test_another_optimizer_does_not_go_on(root):
    train(settings(root, "muon", output_dir=root / "other"))
    pretend_unfinished(root / "other", 2)
    with pytest.raises(CheckpointError, match="optimizer was 'muon', now 'adafactor'"):
        train(
            settings(
                root,
                "adafactor",
                output_dir=root / "other",
                dtype="float32",
                stochastic_rounding=False,
            )
        )


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_torch_8bit", "adafactor", "muon"])
def test_only_bitsandbytes_waits_once_a_step(root, tmp_path, name):
    config = settings(root, name, logging_steps=100, checkpointing_steps=None).to_dict()

    def syncs(steps):
        given = config | {
            "max_train_steps": steps,
            "num_epochs": None,
            "cache_dir": str(tmp_path / "cache"),
        }
        del given["output_dir"]
        return syncs_of_a_run(tmp_path, str(steps), **given)

    waits = 1 if name == "adamw_8bit" else 0
    short = syncs(2)
    assert syncs(6) == short + 4 * waits
