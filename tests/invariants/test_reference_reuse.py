"""What is computed again after a change, and only that: whole runs on one cache."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM

from preftune import ExperimentConfig, train
from preftune.recipes.pairs import load_experiment_pairs, prepare_tokenizer
from preftune.tracking.progress import ProgressDisplay
from tests.runs import read_metrics, tiny_config, tiny_settings
from tests.tiny import make_pairs, tiny_tokenizer, write_jsonl

LENGTHS = {"max_length": 150, "truncation": "keep_start"}
"""Cuts some of the rows."""


def run(root: Path, name: str, **options: Any) -> dict[str, int]:
    """Log-probs that a run of one step computes and reuses."""
    shutil.rmtree(root / name, ignore_errors=True)
    steps = {"max_train_steps": 1, "num_epochs": None, "warmup_ratio": 0.0}
    config = tiny_config(root, output_dir=root / name, **steps | options)
    return train(config).manifest["reference"]["reference"]


def answers(root: Path, **options: Any) -> set[tuple[Any, ...]]:
    """The tokens of a run's answers, each with its prompt."""
    config = ExperimentConfig(**tiny_settings(root, **options))
    pairs = load_experiment_pairs(config, prepare_tokenizer(config), ProgressDisplay("none"))
    return {(row.prompt_ids, c.ids) for row in pairs.train.examples for c in row.completions}


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose cache holds the reference of the tiny run."""
    root = tmp_path_factory.mktemp("scored")
    assert run(root, "first") == {"computed": 42, "reused": 0}
    return root


@pytest.fixture
def root(scored: Path, tmp_path: Path) -> Path:
    """The same under one path, which each test may change."""
    shutil.copytree(scored, tmp_path / "root", ignore=shutil.ignore_patterns("run", "first"))
    return tmp_path / "root"


# ---------------------------------------------------------------- nothing


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 5e-7, "optimizer": "sgd", "lr_scheduler_type": "cosine"},
        {"beta": 0.7, "sft_weight": 0.5},
        {"loss_type": "dpo_norm"},
        {"loss_type": "ipo", "ld_alpha": 0.3},
        {"loss_type": ["dpo", "hinge"]},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        {"max_tokens_per_microbatch": 100},
        {"seed": 7, "data_seed": 3},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_what_the_reference_does_not_depend_on_computes_nothing(scored, options):
    assert run(scored, "run", **options) == {"computed": 0, "reused": 42}


def test_another_name_of_the_same_model_and_data_computes_nothing(root):
    for name in ("model", "pairs.jsonl"):
        (root / name).rename(root / f"other-{name}")
    options = {"model_name_or_path": root / "other-model"}
    options |= {"dataset_name": root / "other-pairs.jsonl"}
    config = json.loads((root / "other-model" / "config.json").read_text())
    config |= {"transformers_version": "5.0.0", "_name_or_path": "someone/else"}
    (root / "other-model" / "config.json").write_text(json.dumps(config))
    assert run(root, "run", **options) == {"computed": 0, "reused": 42}


# ---------------------------------------------------------------- some rows


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, LENGTHS),
        (LENGTHS, LENGTHS | {"truncation": "keep_end"}),
        (LENGTHS, LENGTHS | {"max_prompt_length": 50}),
        ({}, {"chat_template": "zephyr"}),
    ],
    ids=["max_length", "truncation", "max_prompt_length", "chat_template"],
)
def test_answers_whose_tokens_change_are_the_only_ones_computed(root, before, after):
    run(root, "before", **before)
    old, new = answers(root, **before), answers(root, **after)
    assert new - old  # the change does something
    assert run(root, "after", **after) == {"computed": len(new - old), "reused": len(new & old)}
    if "chat_template" not in after:
        assert new & old  # and not to every row


def test_added_rows_are_the_only_ones_computed(root):
    rows = make_pairs(21, seed=0)
    write_jsonl(root / "pairs.jsonl", [make_pairs(1, seed=5)[0], *rows])
    assert run(root, "more") == {"computed": 2, "reused": 42}
    write_jsonl(root / "pairs.jsonl", rows[:10])
    assert run(root, "fewer") == {"computed": 0, "reused": 20}


def in_place(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Change a file, but not its size nor its time."""
    times, before = path.stat(), path.read_bytes()
    after = edit(before)
    assert len(after) == len(before)
    assert after != before
    path.write_bytes(after)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_row_edited_in_place_is_noticed(root):
    word = make_pairs(21, seed=0)[4]["chosen"][0]["content"].removeprefix("Yes ").encode()
    in_place(root / "pairs.jsonl", lambda text: text.replace(b"Yes " + word, b"Yet " + word, 1))
    assert run(root, "run") == {"computed": 1, "reused": 41}


# ---------------------------------------------------------------- all


def test_one_byte_of_weights_saved_in_place_is_noticed(root):
    def edit(content: bytes) -> bytes:
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]

    in_place(root / "model" / "model.safetensors", edit)
    assert run(root, "run") == {"computed": 42, "reused": 0}


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"mixed_precision": "bf16"},
        {"forward_layout": "concatenated"},
        {"forward_layout": "separate"},
        {"forward_layout": "concatenated", "attn_implementation": "eager"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_other_numerics_compute_all(scored, options):
    assert run(scored, "run", **options) == {"computed": 42, "reused": 0}
    assert run(scored, "run", **options) == {"computed": 0, "reused": 42}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5000.0}),
        ("rms_norm_eps", 1e-3),
        ("hidden_act", "gelu"),
    ],
)
def test_a_field_of_the_model_that_reaches_the_forward_computes_all(root, field, value):
    file = root / "model" / "config.json"
    config = json.loads(file.read_text())
    assert config[field] != value
    file.write_text(json.dumps(config | {field: value}))
    assert run(root, "run") == {"computed": 42, "reused": 0}


def test_the_attention_window_computes_all(root):
    shape = json.loads((root / "model" / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")
    kept += ("num_attention_heads", "num_key_value_heads", "eos_token_id", "bos_token_id")
    settings = {key: shape[key] for key in kept}
    MistralForCausalLM(MistralConfig(**settings, sliding_window=8)).save_pretrained(root / "m")
    tiny_tokenizer().save_pretrained(root / "m")
    options = {"model_name_or_path": root / "m", "forward_layout": "concatenated"}
    assert run(root, "a", **options) == {"computed": 42, "reused": 0}
    config = json.loads((root / "m" / "config.json").read_text())
    (root / "m" / "config.json").write_text(json.dumps(config | {"sliding_window": 16}))
    assert run(root, "b", **options) == {"computed": 42, "reused": 0}
    (root / "m" / "config.json").write_text(json.dumps(config))
    assert run(root, "c", **options) == {"computed": 0, "reused": 42}


# ---------------------------------------------------------------- never of trained weights


def stored(run: Path) -> dict[str, bytes]:
    """The shards of a run's reference."""
    namespace = json.loads((run / "run.json").read_text())["reference_namespace"]
    folder = run.parent / "cache" / "reference" / namespace
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_store_deleted_in_the_middle_of_a_run_is_built_of_the_start_again(root):
    options: dict[str, Any] = {"checkpointing_steps": 1, "keep_last_n_checkpoints": None}
    straight = train(tiny_config(root, output_dir=root / "straight", **options)).folder.root
    shards = stored(straight)
    folder = train(tiny_config(root, **options)).folder
    manifest = json.loads(folder.manifest.read_text())
    folder.manifest.write_text(json.dumps(manifest | {"status": "running"}))
    for step in (4, 5, 6):
        shutil.rmtree(folder.checkpoint(step))
    shutil.rmtree(root / "cache" / "reference")
    resumed = train(tiny_config(root, **options)).manifest
    assert resumed["reference"]["reference"] == {"computed": 42, "reused": 0}
    assert stored(folder.root) == shards
    assert read_metrics(folder.root) == read_metrics(straight)
    assert (folder.final / "model.safetensors").read_bytes() == (
        straight / "final" / "model.safetensors"
    ).read_bytes()
