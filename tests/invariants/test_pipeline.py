"""`preftune pipeline`: each stage from the one before, never twice, and to the same bytes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune.cli.main import main
from tests.pipelines import outputs, pipeline_file
from tests.runs import pretend_unfinished, read_metrics


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Callable[[bool], Path]:
    """The folder that holds a finished pipeline, chain/: of adapters, or of whole weights."""
    made: dict[bool, Path] = {}

    def of(lora: bool) -> Path:
        if lora not in made:
            made[lora] = tmp_path_factory.mktemp("adapters" if lora else "weights")
            assert main(["pipeline", str(pipeline_file(made[lora], lora=lora))]) == 0
        return made[lora]

    return of


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("lora", [True, False])
def test_each_stage_starts_from_the_one_before(unbroken, lora):
    root = unbroken(lora)
    chain = root / "chain"
    dpo = json.loads((chain / "dpo" / "run.json").read_text())
    if lora:
        assert dpo["config"]["adapter_name_or_path"] == str(chain / "sft" / "final")
        assert dpo["config"]["model_name_or_path"] == str(root / "model")
        base = AutoModelForCausalLM.from_pretrained(root / "model")
        merged = PeftModel.from_pretrained(base, chain / "dpo" / "final").merge_and_unload()
        expected = merged.state_dict()
        got = load_file(chain / "merge" / "model" / "model.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.allclose(got[key], expected[key], atol=1e-6) for key in got)
    else:
        assert dpo["config"]["model_name_or_path"] == str(chain / "sft" / "final")
    # Reference and policy are the SFT model: ln 2 at the first step, and some of sft's own words.
    assert read_metrics(chain / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    results = json.loads((chain / "evaluate" / "results.json").read_text())
    assert results["total"]["num_pairs"] == 5
    final = chain / "merge" / "model" if lora else chain / "dpo" / "final"
    assert list(results["models"].values()) == [str(final)]
    # An adapter is no model by itself: there are no rewards against it.
    references = [] if lora else [str(chain / "sft" / "final")]
    assert list(results["references"].values()) == references
    assert len(results["total"]["rewards"]) == len(references)
    listed = (chain / "evaluate" / "lists.jsonl").read_text().splitlines()
    assert len(listed) == sum(results["lists"].values())


def test_a_finished_stage_is_not_repeated(unbroken):
    root = unbroken(True)
    before = {p: p.stat().st_mtime_ns for p in (root / "chain").rglob("*") if p.is_file()}
    assert main(["pipeline", str(pipeline_file(root, lora=True))]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def kill_in(chain: Path, stage: str) -> None:
    """Leave the folder as a kill -9 in the middle of a stage does."""
    order = ["sft", "dpo", "merge", "evaluate"]
    for later in order[order.index(stage) + 1 :]:
        shutil.rmtree(chain / later, ignore_errors=True)
    if stage in ("sft", "dpo"):
        pretend_unfinished(chain / stage, after=1)
    elif stage == "merge":
        (chain / "merge" / "model").rename(chain / "merge" / ".partial-model")
    else:
        (chain / "evaluate" / "results.json").unlink()


@pytest.mark.parametrize(
    ("stage", "lora"),
    [("sft", True), ("dpo", True), ("merge", True), ("evaluate", True), ("dpo", False)],
)
def test_killed_in_any_stage_it_gives_what_the_unbroken_one_gives(unbroken, stage, lora):
    root = unbroken(lora)
    expected = outputs(root / "chain")
    assert len(expected) > 8
    shutil.copytree(root / "chain", root / "whole")
    try:
        kill_in(root / "chain", stage)
        assert main(["pipeline", str(pipeline_file(root, lora=lora))]) == 0
        assert outputs(root / "chain") == expected
    finally:
        shutil.rmtree(root / "chain")
        (root / "whole").rename(root / "chain")


def refused(root: Path, capsys: Any, **stages: Any) -> str:
    """The error of a pipeline with changed settings, which changes nothing."""
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    path = pipeline_file(root, lora=True, **stages)
    assert main(["pipeline", str(path)]) == 2
    after = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} <= {path}
    return capsys.readouterr().err


def test_changed_settings_of_a_finished_stage_are_refused_by_name(unbroken, capsys):
    root = unbroken(True)
    said = refused(
        root,
        capsys,
        sft={"seed": 7},
        dpo={"beta": 0.3},
        merge={"save_dtype": "bfloat16"},
        evaluate={"max_length": 100},
    )
    assert "stage sft: " in said
    assert "seed was 42, now 7" in said
    assert "stage dpo: " in said
    assert "beta was 0.2, now 0.3" in said
    assert "stage merge: " in said
    assert "save_dtype was 'auto', now 'bfloat16'" in said
    assert "stage evaluate: " in said
    assert "max_length was 2048, now 100" in said


def test_work_on_what_is_gone_is_refused(unbroken, capsys, tmp_path):
    root = unbroken(True)
    chain, kept = root / "chain", tmp_path / "kept"
    (chain / "sft").rename(kept)
    try:
        said = refused(root, capsys)
        assert "stage dpo has begun, and stage sft, which comes before it, is not" in said
        assert f"restore {chain / 'sft'}, or delete {chain / 'dpo'}, " in said
    finally:
        kept.rename(chain / "sft")
    shutil.rmtree(chain / "evaluate")
    weights = chain / "merge" / "model" / "model.safetensors"
    weights.rename(kept)
    try:
        said = refused(root, capsys)
        assert "stage merge: it is finished, and its model is not whole" in said
    finally:
        kept.rename(weights)
    (chain / "evaluate").mkdir()
    (chain / "evaluate" / "notes.txt").write_text("mine")
    assert "stage evaluate: " in (said := refused(root, capsys))
    assert "holds files that are not a pipeline's" in said
    shutil.rmtree(chain / "evaluate")
    assert main(["pipeline", str(pipeline_file(root, lora=True))]) == 0


def test_all_stages_are_looked_at_before_the_first_begins(tmp_path, capsys):
    """Data that is not there, and rows of the wrong kind, of stages that are hours away."""
    root = tmp_path
    path = pipeline_file(
        root,
        lora=True,
        dpo={"dataset_name": str(root / "said.jsonl")},
        evaluate={"dataset_name": str(root / "absent.jsonl")},
    )
    assert main(["pipeline", str(path)]) == 2
    said = capsys.readouterr().err
    assert "stage dpo: said.jsonl:1" in said
    assert "--stage sft" in said
    assert "stage evaluate: " in said
    assert "absent.jsonl" in said
    assert not (root / "chain" / "sft").exists()


def test_an_interrupted_stage_ends_the_command_with_75(tmp_path, capsys):
    path = pipeline_file(tmp_path, lora=True, sft={"max_run_time": 1, "num_epochs": 50.0})
    assert main(["pipeline", str(path)]) == 75
    assert "max_run_time 1 is up" in capsys.readouterr().err
    assert (tmp_path / "chain" / "sft" / "run.json").is_file()
    assert not (tmp_path / "chain" / "dpo").exists()
