"""kto and bco on single labelled answers, weights and margins, in whole runs."""

import json
from pathlib import Path

import pytest

from preftune import train
from preftune.errors import DataError
from tests.runs import SHAPES, read_metrics, tiny_config
from tests.tiny import make_pairs, write_jsonl


def labelled(root: Path, number: int = 21) -> Path:
    """Single answers of which every third is undesirable."""
    rows = [
        {
            "prompt": pair["prompt"],
            "completion": pair["rejected" if i % 3 == 0 else "chosen"],
            "label": i % 3 != 0,
        }
        for i, pair in enumerate(make_pairs(number, seed=0))
    ]
    return write_jsonl(root / "labelled.jsonl", rows)


def run(root: Path, name: str, **settings) -> list[dict[str, float]]:
    # Far enough from the reference for the baselines to leave 0.
    options = {"learning_rate": 3e-3, "num_epochs": 3.0, "output_dir": root / name}
    train(tiny_config(root, **options | settings))
    return read_metrics(root / name)


def assert_alike(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        ignored = {"num_tokens", "logratios/displaced", "rewards/accuracies"}
        assert first.keys() == second.keys()
        for key in first.keys() - ignored:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("loss_type", ["kto", "bco"])
def test_how_a_batch_is_cut_changes_nothing(tmp_path, loss_type):
    data = labelled(tmp_path)
    options = {"loss_type": loss_type, "dataset_name": data, "learning_rate": 3e-4}
    runs = [run(tmp_path, name, **options, **shape) for name, shape in SHAPES.items()]
    for other in runs[1:]:
        assert_alike(runs[0], other)
    assert max(abs(line["rewards/baseline"]) for line in runs[0]) > 1e-4
    manifest = json.loads((tmp_path / "8x1" / "run.json").read_text())
    # Of kto each prompt is scored with its own answer and with another's.
    assert manifest["reference"]["reference"]["computed"] == (42 if loss_type == "kto" else 21)


def test_pairs_are_taken_apart(tmp_path):
    run(tmp_path, "run", loss_type="bco", num_epochs=1.0)
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["data"]["train"]["num_pairs"] == 42
    assert manifest["steps"] == 6


def test_a_weight_is_a_factor_and_the_batch_is_divided_by_its_rows(tmp_path):
    """Rows of weight 0 count in N: as if they gave no gradient."""
    pairs = make_pairs(8, seed=0)
    plain = write_jsonl(tmp_path / "plain.jsonl", pairs)
    half = write_jsonl(tmp_path / "half.jsonl", [pair | {"weight": 0.5} for pair in pairs])
    first = write_jsonl(
        tmp_path / "first.jsonl", [p | {"weight": 8.0 * (i == 0)} for i, p in enumerate(pairs)]
    )
    alone = write_jsonl(tmp_path / "alone.jsonl", pairs[:1])
    options = {"loss_type": "ipo", "num_epochs": 1.0, "shuffle": False, **SHAPES["8x1"]}
    of = {
        path.stem: run(tmp_path, path.stem, dataset_name=path, **options)[0]
        for path in (plain, half, first, alone)
    }
    assert of["half"]["loss"] == pytest.approx(of["plain"]["loss"] / 2, rel=1e-6)
    assert of["half"]["grad_norm"] == pytest.approx(of["plain"]["grad_norm"] / 2, rel=1e-4)
    assert of["first"]["loss"] == pytest.approx(of["alone"]["loss"], rel=1e-6)
    assert of["first"]["grad_norm"] == pytest.approx(of["alone"]["grad_norm"], rel=1e-4)


def test_margins_are_read_by_odpo_alone(tmp_path, capsys):
    pairs = make_pairs(8, seed=0)
    data = write_jsonl(tmp_path / "margins.jsonl", [p | {"margin": 0.75} for p in pairs])
    options = {"num_epochs": 1.0, "dataset_name": data, **SHAPES["8x1"]}
    # log(1 + e^0.75), as in the losses' own test
    assert run(tmp_path, "odpo", loss_type="odpo", **options)[0]["loss"] == pytest.approx(1.136871)
    capsys.readouterr()
    run(tmp_path, "dpo", progress="plain", **options)
    said = capsys.readouterr().err
    assert "margins.jsonl have a margin, which dpo does not read (odpo does)" in said
    some = [pair | {"margin": 0.75 if i < 6 else None} for i, pair in enumerate(pairs)]
    lacking = options | {"dataset_name": write_jsonl(tmp_path / "some.jsonl", some)}
    with pytest.raises(DataError, match=r"2 of 8 rows have no margin \(first: some.jsonl:7\)"):
        run(tmp_path, "lacking", loss_type="odpo", **lacking)
