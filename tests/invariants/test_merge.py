"""`preftune merge`: a plain model that says what base and adapter say, or nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.cli.main import main
from preftune.recipes import merge as recipe
from tests.adapters import base_and_adapter, sft_adapter
from tests.runs import tiny_model_folder

# PEFT's own wrapper asks transformers in a way that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora-dora": {"use_rslora": True, "use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "whole-head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
}
IDS = torch.arange(3, 40).unsqueeze(0)


def merged(root: Path, *words: str) -> int:
    places = ["--adapter", str(root / "adapter"), "--output", str(root / "new")]
    return main(["merge", *places, "--model_name_or_path", str(root / "model"), *words])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_merged_model_says_what_base_and_adapter_say(tmp_path, capsys, kind):
    tiny_model_folder(tmp_path / "model")
    sft_adapter(tmp_path / "adapter", **KINDS[kind])
    assert merged(tmp_path) == 0
    assert f"written: {tmp_path / 'new'} (float32); logits of 4 probe" in capsys.readouterr().out
    expected = base_and_adapter(tmp_path / "model", tmp_path / "adapter")(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-4)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert (bare(IDS).logits - expected).abs().max() > 0.05
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in bare.named_parameters()}
    assert not (tmp_path / "new" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "new").chat_template is not None


def test_in_another_dtype_it_says_how_far_that_is(tmp_path, capsys):
    tiny_model_folder(tmp_path / "model")
    sft_adapter(tmp_path / "adapter")
    assert merged(tmp_path, "--save_dtype", "bfloat16") == 0
    said = capsys.readouterr().out
    exact, rounded = (float(said.split(mark)[0].split()[-1]) for mark in (" of the", " as written"))
    assert exact < 1e-3 < rounded < 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_a_merge_that_says_something_else_writes_nothing(tmp_path, capsys, monkeypatch):
    tiny_model_folder(tmp_path / "model")
    sft_adapter(tmp_path / "adapter")
    whole = recipe._merge_layers

    def wrong(model):
        whole(model)
        with torch.no_grad():
            model.lm_head.weight *= 1.01

    monkeypatch.setattr(recipe, "_merge_layers", wrong)
    assert merged(tmp_path) == 2
    assert "by 0.01 of the largest, and 0.001 is allowed; nothing was" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if "new" in p.name] == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "2 problems:\n- adapter is not set; it must name a LoRA adapter"),
        (["--adapter", "{}/none", "--output", "{}/new"], "no such folder"),
        (["--adapter", "{}/model", "--output", "{}/new"], "has no adapter_config.json"),
        (["--adapter", "{}/adapter", "--output", "{}/model"], "which exists; give a new folder"),
        (["--adapter", "{}/adapter", "--output", "{}/new"], "whose files name no base; give it"),
    ],
)
def test_what_cannot_be_merged_is_told(tmp_path, capsys, words, text):
    tiny_model_folder(tmp_path / "model")
    sft_adapter(tmp_path / "adapter")
    assert main(["merge", *(word.format(tmp_path) for word in words)]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
