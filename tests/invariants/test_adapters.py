"""LoRA through whole runs: what it starts from, what it leaves, and that it goes on to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import train
from preftune.cli.main import main
from preftune.errors import CheckpointError, ConfigError
from tests.adapters import base_and_adapter, plain_sums, sft_adapter
from tests.runs import SHAPES, pretend_unfinished, read_metrics, read_state, tiny_config
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

# PEFT's own wrapper asks transformers in a way that is about to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

ALL_ROWS = {"per_device_train_batch_size": 21, "gradient_accumulation_steps": 1}
NEW: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_r": 8},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "lora_r": 4},
    "pissa-rslora-dora": {
        "init_lora_weights": "pissa_niter_4",
        "lora_r": 4,
        "use_rslora": True,
        "use_dora": True,
    },
    "whole-head": {"modules_to_save": ["lm_head"], "lora_target_modules": ["q_proj", "up_proj"]},
    "on-head": {"lora_target_modules": ["v_proj", "lm_head"], "init_lora_weights": "gaussian"},
}
SFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-converted": {"init_lora_weights": "pissa", "converted": True},
    "whole-head": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "up_proj"]},
}


def logps(metrics: dict[str, float], prefix: str = "") -> dict[str, float]:
    return {side: metrics[f"{prefix}logps/{side}"] for side in ("chosen", "rejected")}


def held_out(root: Path) -> Path:
    return write_jsonl(root / "held_out.jsonl", make_pairs(8, seed=9))


def run(root: Path, **options: Any) -> Path:
    settings = {"use_lora": True, "learning_rate": 1e-2} | options
    return train(tiny_config(root, **settings)).folder.root


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("kind", SFT)
def test_it_starts_from_the_sft_model_and_is_measured_against_it(tmp_path, kind, layout):
    """At step 0 both sides are those of PEFT's own forward of base and adapter, not the base's."""
    if layout == "concatenated" and kind not in ("plain", "pissa"):
        pytest.skip("layouts are tested with two kinds")
    adapter = sft_adapter(tmp_path / "sft", **SFT[kind])
    options = ALL_ROWS | {"adapter_name_or_path": adapter, "forward_layout": layout}
    first = read_metrics(run(tmp_path, **options))[0]
    data = tmp_path / "pairs.jsonl"
    expected = plain_sums(base_and_adapter(tmp_path / "model", adapter), data)
    assert logps(first) == pytest.approx(expected, abs=1e-4)
    bare = plain_sums(tiny_model(), data)
    assert all(abs(bare[side] - expected[side]) > 0.02 for side in bare)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", NEW)
def test_final_is_the_trained_model_to_plain_peft(tmp_path, kind):
    """On the base as its own files have it, also where PiSSA changed that for the training."""
    data = held_out(tmp_path)
    options = NEW[kind] | ALL_ROWS | {"eval_dataset": data, "eval_steps": 2}
    folder = run(tmp_path, **options)
    lines = read_metrics(folder)
    begun = plain_sums(tiny_model(), tmp_path / "pairs.jsonl")
    assert logps(lines[0]) == pytest.approx(begun, abs=1e-3)
    bare = plain_sums(tiny_model(), data)
    trained = logps(lines[-1], "eval/")
    got = plain_sums(base_and_adapter(tmp_path / "model", folder / "final"), data)
    assert got == pytest.approx(trained, abs=2e-4)
    assert abs(bare["rejected"] - got["rejected"]) > 0.1
    AutoTokenizer.from_pretrained(folder / "final")
    assert "library_name: peft" in (folder / "final" / "README.md").read_text()


def test_an_sft_adapter_and_what_was_trained_on_top_are_one_adapter(tmp_path):
    """final/ of a run from PEFT's unconverted PiSSA adapter is right on the untouched base."""
    adapter, data = sft_adapter(tmp_path / "sft", **SFT["pissa"]), held_out(tmp_path)
    options = ALL_ROWS | {"adapter_name_or_path": adapter, "eval_dataset": data, "eval_steps": 2}
    folder = run(tmp_path, **options)
    got = plain_sums(base_and_adapter(tmp_path / "model", folder / "final"), data)
    assert got == pytest.approx(logps(read_metrics(folder)[-1], "eval/"), abs=2e-4)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_packed_and_padded_train_alike(tmp_path, kind):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    lines = []
    for name in ("8x1", "1x8", "padded"):
        options = {"output_dir": tmp_path / name, **NEW[kind], **SHAPES[name]}
        folder = run(tmp_path, reference_model_name_or_path=tmp_path / "other", **options)
        lines.append([{**x, "num_tokens": 0} for x in read_metrics(folder)])
    for others in lines[1:]:
        for one, other in zip(lines[0], others, strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


def test_dropout_of_adapters_acts_in_training_and_nowhere_else(tmp_path):
    """`disable_dropout`, which is on, leaves it alone; reference and evaluation know none."""
    adapter = sft_adapter(tmp_path / "sft")
    options = {"adapter_name_or_path": adapter, "eval_dataset": held_out(tmp_path)}
    options |= ALL_ROWS | {"eval_steps": 1, "learning_rate": 1e-12}
    still, dropped = (
        read_metrics(run(tmp_path, output_dir=tmp_path / str(p), lora_dropout=p, **options))
        for p in (0.0, 0.5)
    )
    one, two = ([line for line in lines if "loss" in line] for lines in (still, dropped))
    assert abs(one[0]["logps/chosen"] - two[0]["logps/chosen"]) > 0.1
    assert abs(two[0]["logps/chosen"] - two[1]["logps/chosen"]) > 1e-3
    evaluated = [[x for x in lines if "eval/logps/chosen" in x] for lines in (still, dropped)]
    for other in evaluated[1]:
        assert logps(other, "eval/") == pytest.approx(logps(evaluated[0][0], "eval/"), abs=1e-4)


def test_an_adapters_own_dropout_does_not_go_with_rows_that_are_shared_out(tmp_path):
    options: dict[str, Any] = {"sequence_parallel_size": 2}
    options["adapter_name_or_path"] = sft_adapter(tmp_path / "sft", lora_dropout=0.1)
    with pytest.raises(ConfigError, match=r"has a dropout of 0.1: .* set --lora_dropout 0"):
        run(tmp_path, **options)


@pytest.mark.parametrize("kind", ["plain", "pissa", "sft", "pissa-rslora-dora", "whole-head"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, kind):
    options: dict[str, Any] = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None}
    options |= {"lora_dropout": 0.25, **NEW.get(kind, {})}
    if kind == "sft":
        options["adapter_name_or_path"] = sft_adapter(tmp_path / "sft", **SFT["pissa"])
    straight = run(tmp_path, **options)
    shutil.copytree(straight, tmp_path / "stopped")
    pretend_unfinished(tmp_path / "stopped", 3)
    again = run(tmp_path, output_dir=tmp_path / "stopped", **options)
    assert read_metrics(again) == read_metrics(straight)
    files = [load_file(path / "final" / "adapter_model.safetensors") for path in (straight, again)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    run(root, checkpointing_steps=2, **NEW["pissa"])
    return root


def test_a_checkpoint_holds_what_trains_and_no_base(trained):
    folder = trained / "run" / "checkpoints" / "step-00000006"
    names = load_file(folder / "model.safetensors").keys()
    assert names
    assert all("lora_" in name for name in names)
    moments = {n.partition("/")[2] for n in load_file(folder / "optimizer.safetensors")}
    assert moments == names
    assert load_file(folder / "taken.safetensors").keys() == names


def test_a_changed_base_is_refused(tmp_path):
    options: dict[str, Any] = {"checkpointing_steps": 2, "keep_last_n_checkpoints": None}
    pretend_unfinished(run(tmp_path, **options), 2)
    tiny_model(seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"model weights was .*, now"):
        run(tmp_path, **options)


def test_export_of_a_checkpoint_is_an_adapter_too(trained, tmp_path, capsys):
    """Of the last step: byte for byte what final/ holds."""
    checkpoint = trained / "run" / "checkpoints" / "step-00000006"
    assert main(["export", str(checkpoint), str(tmp_path / "new")]) == 0
    assert "(step 6, float32)" in capsys.readouterr().out
    written = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert written == {p.name: p.read_bytes() for p in (trained / "run" / "final").iterdir()}


def test_the_manifest_says_how_much_trains(trained):
    about = json.loads((trained / "run" / "run.json").read_text())["model"]
    assert about["trainable_parameters"] == 4 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    checkpoint = trained / "run" / "checkpoints" / "step-00000006"
    assert read_state(checkpoint)["identity"]["adapter"]["r"] == 4


def test_nothing_of_the_base_is_saved_with_the_adapter(trained):
    names = load_file(trained / "run" / "final" / "adapter_model.safetensors").keys()
    assert all(".lora_" in name for name in names)
    base = AutoModelForCausalLM.from_pretrained(trained / "model")
    assert torch.equal(base.lm_head.weight, tiny_model().lm_head.weight)
