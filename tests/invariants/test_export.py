"""Any checkpoint becomes a model in the Hugging Face format."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import train
from preftune.cli.main import main
from preftune.recipes import export as recipe
from preftune.recipes import model_folder
from tests.runs import edit_state, read_state, tiny_config


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("root")
    train(tiny_config(root, checkpointing_steps=2, dtype="float32", learning_rate=1e-2))
    return root


def checkpoint(root: Path, step: int) -> str:
    return str(root / "run" / "checkpoints" / f"step-{step:08d}")


def test_of_the_last_step_it_is_what_final_holds(root, tmp_path, capsys):
    """Byte for byte, config, tokenizer and card included; from a copy far from its run, too."""
    shutil.copytree(checkpoint(root, 6), tmp_path / "copy")
    assert main(["export", str(tmp_path / "copy"), str(tmp_path / "deep" / "model")]) == 0
    said = capsys.readouterr().out
    assert said == f"written: {tmp_path / 'deep' / 'model'} (step 6, float32)\n"
    exported = {p.name: p.read_bytes() for p in (tmp_path / "deep" / "model").iterdir()}
    assert exported == {p.name: p.read_bytes() for p in (root / "run" / "final").iterdir()}


def test_transformers_loads_it_in_the_dtype_asked_for(root, tmp_path):
    words = ["export", checkpoint(root, 4), str(tmp_path / "model"), "--save_dtype", "bfloat16"]
    assert main(words) == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    final = AutoModelForCausalLM.from_pretrained(root / "run" / "final")
    assert half.dtype == torch.bfloat16
    assert main(["export", checkpoint(root, 4), str(tmp_path / "full")]) == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    parts = zip(full.parameters(), half.parameters(), strict=True)
    assert all(torch.equal(one.bfloat16(), other) for one, other in parts)
    assert not torch.equal(full.lm_head.weight, final.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "full")
    ids = tokenizer("What is the capital of France?", return_tensors="pt").input_ids
    assert torch.isfinite(full(ids).logits).all()
    assert "| Steps | 4, " in (tmp_path / "full" / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "export needs two folders first; write: preftune export CHECKPOINT OUTPUT_DIR"),
        (["{root}/run", "--save_dtype", "auto"], "export needs two folders first"),
        (["{root}/run", "{tmp}/new"], "no complete checkpoint is there"),
        (["{checkpoint}", "{root}/run"], "which exists; give a new folder"),
        (["{checkpoint}", "{root}/pairs.jsonl/model"], "pairs.jsonl is a file; give a folder"),
        (["{checkpoint}", "{tmp}/new", "--save_dtype", "int8"], "save_dtype is 'int8'"),
        (["{checkpoint}", "{tmp}/new", "more"], "more"),
    ],
)
def test_what_cannot_be_done_is_told(root, tmp_path, capsys, words, text):
    places = {"root": root, "tmp": tmp_path, "checkpoint": checkpoint(root, 4)}
    assert main(["export", *(word.format(**places) for word in words)]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_damaged_checkpoint_is_not_exported(root, tmp_path, capsys):
    shutil.copytree(checkpoint(root, 4), tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["export", str(tmp_path / "copy"), str(tmp_path / "new")]) == 2
    assert "is damaged: model.safetensors has other content" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_failed_export_leaves_nothing(root, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "model_card", full)
    assert main(["export", checkpoint(root, 4), str(tmp_path / "new")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [False, True])
def test_a_checkpoint_does_not_say_whether_code_is_trusted(root, tmp_path, monkeypatch, given):
    shutil.copytree(checkpoint(root, 4), tmp_path / "copy")
    config = read_state(tmp_path / "copy")["config"] | {"trust_remote_code": True}
    edit_state(tmp_path / "copy", config=config)
    load, asked = recipe.load_model, []

    def loading(config, device, products):
        asked.append(config.trust_remote_code)
        return load(config, device, products)

    monkeypatch.setattr(recipe, "load_model", loading)
    words = ["--trust_remote_code", "true"] if given else []
    assert main(["export", str(tmp_path / "copy"), str(tmp_path / "new"), *words]) == 0
    assert asked == [given]
