"""What is added to a loss does not depend on how a global batch is cut."""

import json
from pathlib import Path

import pytest

from preftune import train
from preftune.batching.batcher import RowBatcher
from tests.runs import SHAPES, read_metrics, tiny_config

TOKEN_MEAN = {"sft_weight": 0.5, "sft_reduction": "token"}
MODIFIED = {
    "ld_alpha": {"ld_alpha": 0.3, "sft_weight": 0.1},
    "ld_alpha of a whole-batch loss": {"loss_type": "aot", "ld_alpha": 0.3, "sft_weight": 0.1},
    "token mean": TOKEN_MEAN,
    "token mean of a whole-batch loss": {"loss_type": ["dpo", "aot"], **TOKEN_MEAN},
    "token mean of cpo": {"loss_type": "cpo", "cpo_nll": "token"},
}


def settings(root: Path, name: str, **overrides) -> dict:
    options = {"learning_rate": 1e-4, "output_dir": root / name, "test_size": 0.25}
    return options | {"eval_strategy": "epoch"} | overrides


def run(root: Path, name: str, **overrides) -> list[dict[str, float]]:
    train(tiny_config(root, **settings(root, name, **overrides)))
    return read_metrics(root / name)


def assert_alike(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        ignored = {"num_tokens"}
        if abs(first["rewards/margins"]) < 1e-6:  # the policy is the reference: the last bit
            ignored |= {"logratios/displaced", "rewards/accuracies"}
        assert first.keys() == second.keys()
        for key in first.keys() - ignored:
            assert second[key] == pytest.approx(first[key], rel=2e-4, abs=2e-5), key


@pytest.mark.parametrize("name", MODIFIED)
def test_how_a_batch_is_cut_changes_nothing(tmp_path, name):
    runs = [run(tmp_path, shape, **MODIFIED[name], **SHAPES[shape]) for shape in SHAPES]
    for other in runs[1:]:
        assert_alike(runs[0], other)


@pytest.mark.parametrize("off", [{"ld_alpha": 1.0}, {"sft_reduction": "sequence"}], ids=str)
def test_a_modifier_changes_the_gradient_and_asks_nothing_of_the_reference(tmp_path, off):
    options = {"ld_alpha": 0.3, **TOKEN_MEAN}
    on = run(tmp_path, "on", **options)
    without = run(tmp_path, "off", **options | off)
    manifest = json.loads((tmp_path / "off" / "run.json").read_text())
    assert manifest["reference"]["reference"]["computed"] == 0
    assert without[0]["logps/rejected"] == pytest.approx(on[0]["logps/rejected"])
    assert without[0]["grad_norm"] != pytest.approx(on[0]["grad_norm"], rel=1e-3)


def test_a_mean_over_the_tokens_of_a_micro_batch_is_noticed(tmp_path, monkeypatch):
    """The mutant is TRL's: each micro-batch takes the mean over its own tokens."""
    whole = run(tmp_path, "8x1", **TOKEN_MEAN, **SHAPES["8x1"])
    lay_out = RowBatcher.lay_out
    monkeypatch.setattr(RowBatcher, "lay_out", lambda self, rows, batch=None: lay_out(self, rows))
    assert_alike(whole, run(tmp_path, "one", **TOKEN_MEAN, **SHAPES["8x1"]))
    cut = run(tmp_path, "1x8", **TOKEN_MEAN, **SHAPES["1x8"])
    assert cut[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-3)
