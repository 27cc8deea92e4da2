"""Processes that share each packed row train to the numbers of one process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from preftune import train
from preftune.config.experiment import ExperimentConfig
from tests.runs import read_metrics, tiny_settings
from tests.tiny import make_pairs, tiny_mixture, tiny_model, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent

LOSSES = {
    "every token's log-prob": {"loss_type": "wpo", "ld_alpha": 0.5},
    "all pairs together": {"loss_type": "aot"},
    "what the loss keeps": {"loss_type": "beta_dpo"},
    "prompts scored": {"loss_type": "orpo", "orpo_nll": "sequence"},
    "mismatched answers": {"loss_type": "kto"},
    "a reference that follows": {"sync_reference": True, "reference_sync_steps": 2},
    "experts": {"model_name_or_path": "mixture", "load_balancing_weight": 0.1},
}
ALONE = ("orpo", "simpo")
"""Losses without a reference."""


def launch(num_processes: int, script: str, *words: object) -> str:
    """Run a script of this folder by torchrun on the CPU; what it printed."""
    root = str(HERE.parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(num_processes), str(HERE / script), *map(str, words)]
    result = subprocess.run(
        command,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def runs(root: Path, cases: Mapping[str, Mapping[str, Any]], **changes: Any) -> list[Any]:
    """Settings of each case, from a policy that is not the reference."""
    tiny_model(seed=1).save_pretrained(root / "other")
    tiny_mixture().save_pretrained(root / "mixture")
    for name in ("other", "mixture"):
        tiny_tokenizer().save_pretrained(root / name)
    held_out = write_jsonl(root / "held_out.jsonl", make_pairs(5, seed=9))
    base = {"num_epochs": None, "max_train_steps": 4, "eval_dataset": held_out, "eval_steps": 4}
    listed = []
    for name, case in cases.items():
        own = base | {"output_dir": root / name, **case, **changes}
        follows = case.get("sync_reference") or case.get("loss_type") in ALONE
        if not follows:
            own["reference_model_name_or_path"] = root / "other"
        if "model_name_or_path" in case:
            own["model_name_or_path"] = root / str(case["model_name_or_path"])
        own["output_dir"] = Path(str(own["output_dir"])) / name
        listed.append(tiny_settings(root, **own))
    return listed


def check_equal(first: Path, second: Path) -> None:
    """Every metric; the gradient's norm before clipping and the loss as closely as promised."""
    lines = read_metrics(first), read_metrics(second)
    assert len(lines[0]) == len(lines[1]) >= 4
    for expected, got in zip(*lines, strict=True):
        assert got["learning_rate"] == expected["learning_rate"]
        assert got["num_tokens"] == expected["num_tokens"]
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def train_both(
    root: Path, cases: Mapping[str, Mapping[str, Any]], num_processes: int, **changes: Any
) -> None:
    """The cases on one process here, into one/, and shared by several, into many/."""
    for settings in runs(root, cases, output_dir=root / "one"):
        train(ExperimentConfig(**settings))
    many = {"output_dir": root / "many", "cache_dir": root / "cache-of-many"}
    (root / "many.json").write_text(json.dumps(runs(root, cases, **many, **changes)))
    launch(num_processes, "train_all.py", root / "many.json")


def test_two_processes_share_the_rows_of_every_architecture():
    printed = launch(2, "share_rows.py", 2)
    assert "gpt_oss: " in printed


@pytest.mark.slow
def test_four_processes_share_the_rows_of_every_architecture():
    """As many as there are heads, and more than there are heads of keys."""
    printed = launch(4, "share_rows.py", 4)
    assert "gpt_oss: " in printed


def test_two_processes_that_share_rows_equal_one(tmp_path):
    """21 pairs a pass, in batches of 8, 8 and 5; ten steps are three passes and one more."""
    ten = {"max_train_steps": 10, "eval_steps": 5}
    cases = {
        "8x1": ten | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "1x8": ten | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "recomputed": {"gradient_checkpointing": True, "max_tokens_per_microbatch": 100},
    }
    train_both(tmp_path, cases, 2, sequence_parallel_size=2, checkpointing_steps=2)
    for name in cases:
        check_equal(tmp_path / "one" / name, tmp_path / "many" / name)
    stores = [tmp_path / name / "reference" for name in ("cache", "cache-of-many")]
    one, many = (
        {p.name: p.read_bytes() for p in folder.rglob("*.npz")} or sorted(folder.rglob("*"))
        for folder in stores
    )
    assert one == many


@pytest.mark.slow
def test_what_reads_the_whole_row_or_batch_is_right(tmp_path):
    train_both(tmp_path, LOSSES, 2, sequence_parallel_size=2)
    for name in LOSSES:
        check_equal(tmp_path / "one" / name, tmp_path / "many" / name)
