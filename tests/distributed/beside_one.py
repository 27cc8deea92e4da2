"""Runs on several processes, beside the same on one: their settings, and what must be equal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.runs import read_metrics, tiny_settings
from tests.tiny import make_pairs, tiny_mixture, tiny_model, tiny_tokenizer, write_jsonl

TRAIN_ALL = Path(__file__).parent / "train_all.py"


def runs(root: Path, cases: Mapping[str, Mapping[str, Any]], to: str, **changes: Any) -> list[Any]:
    """Settings of each case, from a policy that is not the reference, into the folder `to`."""
    tiny_model(seed=1).save_pretrained(root / "other")
    tiny_mixture().save_pretrained(root / "mixture")
    for name in ("other", "mixture"):
        tiny_tokenizer().save_pretrained(root / name)
    held_out = write_jsonl(root / "held_out.jsonl", make_pairs(5, seed=9))
    base = {"num_epochs": None, "max_train_steps": 4, "eval_dataset": held_out, "eval_steps": 4}
    listed = []
    for name, case in cases.items():
        own = base | {"output_dir": root / to / name, "cache_dir": root / f"cache-{to}"}
        has_reference = case.get("stage") != "sft" and case.get("loss_type") != "orpo"
        if has_reference and not case.get("sync_reference"):
            own["reference_model_name_or_path"] = root / "other"
        own |= case
        if "model_name_or_path" in case:
            own["model_name_or_path"] = root / str(case["model_name_or_path"])
        listed.append(tiny_settings(root, **own | changes))
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
