"""QLoRA through whole runs: what it starts from, what it leaves, and what merging it does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from preftune import train
from preftune.cli.main import main
from preftune.errors import CheckpointError
from preftune.model import layout_probe
from preftune.recipes import merge as recipe
from tests.adapters import plain_sums, sft_adapter
from tests.runs import SHAPES, pretend_unfinished, read_metrics, tiny_config
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

pytest.importorskip("bitsandbytes", reason="needs the extra quant")
# PEFT's own wrapper asks transformers in a way that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ONE_STEP = {"num_epochs": None, "max_train_steps": 1}
ALL_ROWS = {"per_device_train_batch_size": 21, "gradient_accumulation_steps": 1}
FOUR, EIGHT = {"load_in_4bit": True}, {"load_in_8bit": True}
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": (FOUR, {}),
    "fp4-single-rslora": (
        FOUR | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        {"use_rslora": True},
    ),
    "nf4-dora": (FOUR, {"use_dora": True}),
    "8bit": (EIGHT, {}),
    "8bit-dora": (EIGHT, {"use_dora": True}),
    "whole-head": (FOUR, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
}


def run(root: Path, **options: Any) -> Path:
    settings = {"use_lora": True, "learning_rate": 1e-2} | options
    return train(tiny_config(root, **settings)).folder.root


def logps(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {side: metrics[f"{prefix}logps/{side}"] for side in ("chosen", "rejected")}


def quantized_by_transformers(base: Path, options: dict[str, Any]) -> Any:
    """The base, quantised as it loads."""
    if "load_in_8bit" in options:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=options.get("bnb_4bit_quant_type", "nf4"),
            bnb_4bit_use_double_quant=options.get("bnb_4bit_use_double_quant", True),
        )
    # In evaluation bitsandbytes has other products on CPUs; the model has no dropout.
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).train()


def by_libraries(base: Path, adapter: Path, options: dict[str, Any]) -> Any:
    """The quantised base and its adapter, by transformers and PEFT alone."""
    return PeftModel.from_pretrained(quantized_by_transformers(base, options), adapter).train()


@pytest.mark.parametrize("kind", [k for k in STARTS if k not in ("nf4", "8bit-dora")])
def test_it_starts_from_the_sft_model_over_quantised_weights(tmp_path, kind):
    """At step 0 both sides are those of transformers' and PEFT's own forward."""
    options, of_adapter = STARTS[kind]
    adapter = sft_adapter(tmp_path / "sft", **of_adapter)
    settings = ALL_ROWS | ONE_STEP | options | {"adapter_name_or_path": adapter}
    first = read_metrics(run(tmp_path, **settings))[0]
    data, base = tmp_path / "pairs.jsonl", tmp_path / "model"
    expected = plain_sums(by_libraries(base, adapter, options), data)
    assert logps(first) == pytest.approx(expected, abs=2e-4)
    plain = AutoModelForCausalLM.from_pretrained(base)
    original = plain_sums(PeftModel.from_pretrained(plain, adapter).eval(), data)
    bare = plain_sums(quantized_by_transformers(base, options), data)
    # 8 bits are too near the original weights to be told from them by a few sums.
    for other in (bare, *([] if "load_in_8bit" in options else [original])):
        assert any(abs(other[side] - expected[side]) > 2e-3 for side in other)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_packed_padded_and_with_checkpointing_it_trains_alike(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    lines = []
    for name in ("8x1", "padded", "checkpointing"):
        shape = SHAPES.get(name, SHAPES["1x8"] | {"gradient_checkpointing": True})
        settings = {"output_dir": tmp_path / name, **FOUR, **shape}
        settings |= {"reference_model_name_or_path": tmp_path / "other", "num_epochs": 1.0}
        folder = run(tmp_path, **settings)
        lines.append([{**x, "num_tokens": 0} for x in read_metrics(folder)])
        if name == "8x1":
            assert json.loads((folder / "run.json").read_text())["layout"] == "shared_prefix"
    for others in lines[1:]:
        for one, other in zip(lines[0], others, strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"bnb_4bit_compute_dtype": "bfloat16"},
        {"dtype": "bfloat16"},
    ],
    ids=["bf16", "bf16-unpacked", "bf16-weights"],
)
def test_in_narrow_types_it_is_packed_and_passes_the_check_before_the_first_step(
    tmp_path, options, monkeypatch
):
    """Rounding to bf16 inside 4-bit layers, where nothing else is, is not taken for a fault."""
    seen = []
    plain = layout_probe.differing

    def differing(got: Any, expected: Any, dtype: torch.dtype) -> Any:
        seen.append(dtype)
        return plain(got, expected, dtype)

    monkeypatch.setattr(layout_probe, "differing", differing)
    folder = run(tmp_path, **ONE_STEP, **FOUR, **options)
    manifest = json.loads((folder / "run.json").read_text())
    assert manifest["layout"] == "shared_prefix"
    assert set(seen) == {torch.bfloat16}
    record = json.loads((folder / "final" / "preftune.json").read_text())["base"]
    assert record["bnb_4bit_compute_dtype"] == ("float32" if "dtype" in options else "bfloat16")
    assert abs(read_metrics(folder)[0]["rewards/margins"]) < 0.01


@pytest.mark.parametrize("kind", ["nf4", "8bit-dora"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, kind):
    options: dict[str, Any] = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None}
    options |= {"lora_dropout": 0.25, **STARTS[kind][0], **STARTS[kind][1]}
    straight = run(tmp_path, **options)
    shutil.copytree(straight, tmp_path / "stopped")
    pretend_unfinished(tmp_path / "stopped", 3)
    again = run(tmp_path, output_dir=tmp_path / "stopped", **options)
    assert read_metrics(again) == read_metrics(straight)
    name = "final/adapter_model.safetensors"
    assert (again / name).read_bytes() == (straight / name).read_bytes()
    saved = load_file(straight / "checkpoints" / "step-00000006" / "model.safetensors")
    assert saved
    assert all("lora_" in key for key in saved)
    assert (
        main(["export", str(straight / "checkpoints" / "step-00000006"), str(tmp_path / "x")]) == 0
    )
    written = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (straight / "final").iterdir()}


def test_reference_values_belong_to_one_quantisation_and_are_used_again(tmp_path):
    """The manifest tells what is kept, and a run of another kind does not go on in the folder."""

    def reference(name: str, **options: Any) -> tuple[int, int]:
        folder = run(tmp_path, output_dir=tmp_path / name, **ONE_STEP, **options)
        manifest = json.loads((folder / "run.json").read_text())
        counts = manifest["reference"]["reference"]
        return counts["computed"], counts["reused"]

    assert reference("one", **FOUR) == (42, 0)
    assert reference("two", learning_rate=1e-3, **FOUR) == (0, 42)
    assert reference("three", **EIGHT) == (42, 0)
    about = json.loads((tmp_path / "one" / "run.json").read_text())["model"]
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert about["quantized_parameters"] == linear
    assert about["parameters"] - about["trainable_parameters"] == linear + 5 * 32 + 2 * 400 * 32
    with pytest.raises(CheckpointError, match="load_in_4bit was True, now False"):
        run(tmp_path, output_dir=tmp_path / "one", **ONE_STEP)


def test_a_reference_of_its_own_is_quantised_as_the_policy_is(tmp_path):
    """So that the policy's own files, as the reference, give margins of zero."""
    tiny_model().save_pretrained(tmp_path / "copy")
    tiny_tokenizer().save_pretrained(tmp_path / "copy")
    options = {"reference_model_name_or_path": tmp_path / "copy"}
    line = read_metrics(run(tmp_path, **ONE_STEP, **FOUR, **options))[0]
    assert line["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_an_adapter_over_another_base_than_it_was_trained_over_is_told(tmp_path, capsys):
    first = run(tmp_path, **ONE_STEP, **FOUR)
    assert json.loads((first / "final" / "preftune.json").read_text())["base"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
        "dtype": "float32",
    }
    told = "was trained over a base with load_in_4bit True"
    for options, is_told in ((FOUR, False), ({}, True)):
        settings = {"output_dir": tmp_path / str(is_told), "adapter_name_or_path": first / "final"}
        run(tmp_path, progress="plain", **ONE_STEP, **settings, **options)
        assert (told in "".join(capsys.readouterr())) is is_told


def test_a_quantised_model_is_scored_as_it_would_train(tmp_path):
    settings = tiny_config(tmp_path)
    words = ["--model_name_or_path", str(settings.model_name_or_path), "--load_in_8bit", "true"]
    words += ["--dataset_name", str(settings.dataset_name), "--cache_dir", str(settings.cache_dir)]
    words += ["--summary", str(tmp_path / "summary.json")]
    assert main(["score", *words, "--mixed_precision", "fp32", "--progress", "none"]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["total"]["logps"]["model"]
    expected = plain_sums(
        quantized_by_transformers(tmp_path / "model", EIGHT), tmp_path / "pairs.jsonl"
    )
    for side, value in expected.items():
        assert found[side] == pytest.approx(value, abs=3e-4)


# ---------------------------------------------------------------- merging


@torch.no_grad()
def quantised_again(folder: Path, options: dict[str, Any]) -> float:
    """How far the logits of a model are when transformers quantises it."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    again = recipe._logits(quantized_by_transformers(folder, options))
    return recipe._difference(again, recipe._logits(plain))


def merged(adapter: Path, output: Path, *words: str) -> int:
    return main(["merge", "--adapter", str(adapter), "--output", str(output), *words])


@pytest.mark.parametrize("kind", ["nf4", "8bit-dora"])
def test_a_merge_goes_into_the_weights_that_training_saw(tmp_path, capsys, kind):
    """The merged model has the metrics of the last evaluation; that of the original weights not."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_pairs(8, seed=9))
    base, of_adapter = STARTS[kind]
    folder = run(tmp_path, eval_dataset=held_out, eval_steps=2, **base, **of_adapter)
    trained = logps(read_metrics(folder)[-1], "eval/")
    capsys.readouterr()
    sums = {}
    for name in ("auto", "original"):
        assert merged(folder / "final", tmp_path / name, "--base", name) == 0
        said = capsys.readouterr().out
        sums[name] = plain_sums(AutoModelForCausalLM.from_pretrained(tmp_path / name), held_out)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "quantization_config" not in config
        if name == "auto":
            exact = float(said.split(" of the largest")[0].split()[-1])
            original = float(said.split(" away, and the merged")[0].split()[-1])
            again = float(said.split("quantised again, ")[1])
            assert exact < 1e-5 < 1e-3 < min(original, again)
            assert again == pytest.approx(quantised_again(tmp_path / "auto", base), rel=0.5)
        else:
            assert "--base dequantized merges into what training saw" in said
            assert f"else, {original:g} of the largest away" in said
    assert sums["auto"] == pytest.approx(trained, abs=3e-4)
    if kind == "nf4":
        assert any(abs(sums["original"][side] - trained[side]) > 3e-3 for side in trained)


@pytest.mark.parametrize(
    ("record", "words", "text"),
    [
        (None, ["--base", "dequantized"], "has no preftune.json that says how its base was"),
        ('{"base": {"load_in_3bit": true}}', [], "cannot be read (load_in_3bit is not known)"),
        ('{"base": {"load_in_4bit": "maybe"}}', [], "cannot be read ("),
        ("[", [], "cannot be read ("),
    ],
)
def test_how_a_base_was_quantised_is_known_or_nothing_is_written(
    tmp_path, capsys, record, words, text
):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    adapter = sft_adapter(tmp_path / "adapter")
    if record is not None:
        (adapter / "preftune.json").write_text(record)
    words = ["--model_name_or_path", str(tmp_path / "model"), *words]
    assert merged(adapter, tmp_path / "new", *words) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
