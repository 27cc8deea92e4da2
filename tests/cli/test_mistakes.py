"""The commonest mistakes: exit 2, key or row, value and remedy, nothing loaded, nothing changed.

What `check` and `train` say of each is kept in mistakes.txt. After a message was changed on
purpose, write it anew and read the difference:

    PREFTUNE_WRITE_MISTAKES=1 python -m pytest tests/cli/test_mistakes.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli.main import main
from preftune.recipes import preflight
from tests.mounts import IN_A_NAMESPACE, can_mount
from tests.runs import arguments, tiny_config, tiny_settings
from tests.tiny import chat_row, make_pairs

SNAPSHOTS = Path(__file__).with_name("mistakes.txt")
LEFT_OUT = object()
"""Stands for an option that is not given."""

SIDES = ("chosen", "rejected")
TEXT_PAIRS = make_pairs(10, chat=False)
LONE_ANSWERS = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
    for n, row in enumerate(make_pairs(10))
]
NO_STOP_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '### ' + m['role'] + '\n' + m['content'] + '\n#END#\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Mistake:
    """Files to make, and what is typed."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Besides those of a run that works, or in their place."""
    words: tuple[str, ...] = ()
    """In front of the options."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """Text, bytes, rows of a .jsonl file, or a function of the folder; None deletes."""
    device: Mapping[str, Any] = field(default_factory=lambda: NO_GPU)
    """What torch says of the machine."""
    packages: tuple[str, ...] = ()
    """What is installed for attention."""
    cut: str = r"$^"
    """What a library says in its own words, which change from version to version."""


NO_GPU = {"is_available": False}
OLD_GPU = {"is_available": True, "is_bf16_supported": False}
NEW_GPU = {"is_available": True, "is_bf16_supported": True}


def given(*words: str, **options: Any) -> Mistake:
    return Mistake(options, words)


def in_file(text: str, **options: Any) -> Mistake:
    return Mistake(options, ("c.yaml",), {"c.yaml": text})


def with_data(rows: Any, name: str = "d.jsonl", **options: Any) -> Mistake:
    return Mistake({"dataset_name": name} | options, (), {name: rows})


def rows_with(number: int, **columns: Any) -> list[dict[str, Any]]:
    rows = make_pairs(10, seed=0)
    rows[number - 1] |= columns
    return rows


def lone_answers(number: int, column_map: Any = LEFT_OUT, **columns: Any) -> Mistake:
    rows = [row | (columns if n == number else {}) for n, row in enumerate(LONE_ANSWERS, 1)]
    options = {"dataset_name": "d.jsonl", "column_map": column_map, "loss_type": "bco"}
    return Mistake(options, (), {"d.jsonl": rows})


def manifest(**changes: Any) -> Callable[[Path], str]:
    """The run.json of a run that has begun, with other settings."""

    def write(root: Path) -> str:
        config = tiny_config(root, **changes).to_dict()
        return json.dumps({"made_by": "preftune", "status": "running", "config": config})

    return write


def changed_json(name: str, **changes: Any) -> Callable[[Path], str]:
    return lambda root: json.dumps(json.loads((root / name).read_text()) | changes)


def from_model(name: str) -> Callable[[Path], str]:
    """A file of the model, under another folder."""
    return lambda root: (root / "model" / Path(name).name).read_text(errors="replace")


def swapped_tokens(root: Path) -> str:
    """The model's tokenizer.json, in which two tokens have each other's ids."""
    tokenizer = json.loads((root / "model" / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    return json.dumps(tokenizer)


OTHER_TOKENS = {
    "other/config.json": from_model("config.json"),
    "other/model.safetensors": b"not weights",
    "other/tokenizer_config.json": from_model("tokenizer_config.json"),
    "other/tokenizer.json": swapped_tokens,
}
"""A model like that of the run, but for its tokenizer."""


def broken_line(root: Path) -> str:
    lines = [json.dumps(row) for row in make_pairs(10)]
    lines[6] = lines[6][:-1]
    return "\n".join(lines)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


MISTAKES = {
    # ---- options, on the command line and in the file
    "a typo in a flag": given("--learning_rat", "1e-4"),
    "a flag abbreviated": given("--grad", "2"),
    "a typo in a key of the file": in_file("seed: 1\nlearning_rte: 1.0e-4\n"),
    "a flag given twice": given("--beta", "0.1", "--beta", "0.2"),
    "a flag without its value": given("--beta"),
    "a key given twice": in_file("seed: 1\nbeta: 0.1\nseed: 2\n"),
    "evaluation without its job": given(eval_tasks="arc_easy"),
    "an evaluation job without tasks": given(eval_jobs="lm_eval"),
    "an evaluation on Beaker of what is not pushed": given(
        eval_jobs="beaker", eval_tasks="arc_easy", beaker_image="org/image"
    ),
    "a place that an evaluation command has not": given(
        eval_jobs="command", eval_command="judge {modle} {output}"
    ),
    "a wrong word": given(loss_type="sigmod"),
    "a word that is no boolean": given(shuffle="maybe"),
    "beta 0": given(beta=0),
    "a negative learning rate": given(learning_rate=-1e-5),
    "a number with a letter behind it": given(learning_rate="5e-7x"),
    "not a number": in_file("beta: .nan\n"),
    "infinity": in_file("max_grad_norm: .inf\n"),
    "an unquoted no that means nothing": in_file("save_dtype: no\n"),
    "a fraction of a step": given(max_train_steps=2.5, num_epochs=LEFT_OUT),
    "no processes": given(num_proc=0),
    "no tokens in a micro-batch": given(max_tokens_per_microbatch=0),
    "fewer than no tokens in a micro-batch": given(max_tokens_per_microbatch=-2048),
    "a word for tokens in a micro-batch": given(max_tokens_per_microbatch="many"),
    "a fraction of a token in a micro-batch": given(max_tokens_per_microbatch=2048.5),
    "a negative seed": given(seed=-1),
    "single answers and pairs in one loss": given(loss_type="[kto, dpo]"),
    "fine-tuning beside single answers": given(loss_type="kto", sft_weight=0.5),
    "a reduction of nothing": given(sft_reduction="token"),
    "lengths weighed without a reference": given(loss_type="simpo", ld_alpha=0.5),
    "lengths weighed backwards": given(ld_alpha=1.5),
    "margins that are not there": given(loss_type="odpo"),
    "pushing without a place": given(push_to_hub=True),
    "a place and no pushing": given(hub_repo_id="ann/tiny"),
    "a repository without its user": given(push_to_hub=True, hub_repo_id="tiny"),
    "a strategy of pushing that is not there": given(
        push_to_hub=True, hub_repo_id="ann/tiny", hub_strategy="every_save"
    ),
    "pushing offline": given(push_to_hub=True, hub_repo_id="ann/tiny"),
    "a tracker that does not exist": given(report_to="tensorbord"),
    "an unknown preset": given(preset="zephir"),
    "the file of a newer preftune": in_file("preftune_version: 99.1.0\nbeta: 0.1\n"),
    "a folder for a config file": given("model"),
    "an absent config file": given("absent.yaml"),
    "two config files": Mistake({}, ("a.yaml", "b.yaml"), {"a.yaml": "", "b.yaml": ""}),
    "a file that is not YAML": Mistake(
        {}, ("c.yaml",), {"c.yaml": "seed: 1\nrun_name: a: b\n"}, cut=r"(?<=YAML: )[^;]*"
    ),
    "a file that is no mapping": in_file("- seed: 1\n"),
    # ---- settings that contradict each other
    "eval_steps 1.0": given(eval_steps=1.0),
    "evaluation without data": given(eval_steps=5, test_size=LEFT_OUT),
    "samples of a policy that is cut": given(sample_steps=10, zero_stage=3),
    "a number of samples without any": given(num_samples=4),
    "a KL divergence without evaluation": given(eval_kl_samples=64, test_size=LEFT_OUT),
    "early stopping by nothing": given(early_stopping_patience=3),
    "a threshold without patience": given(
        early_stopping_threshold=0.1, metric_for_best_model="eval/loss"
    ),
    "the best weights by nothing": given(load_best_model_at_end=True),
    "answers longer than the model": given(sample_steps=10, sample_max_new_tokens=600),
    "both epochs and steps": given(max_train_steps=5),
    "both warm-ups": given(warmup_ratio=0.1, warmup_steps=5),
    "a warm-up as long as the run": given(warmup_steps=100),
    "a knob of another loss": given(gamma_beta_ratio=0.5),
    "a weight of wpo with simpo": given(loss_type="simpo", wpo_alignment="none"),
    "a reference with simpo": given(loss_type="simpo", reference_model_name_or_path="model"),
    "a negative weight of balance": given(load_balancing_weight=-0.01),
    "balance between the experts of a model without any": given(load_balancing_weight=0.01),
    "a share of the policy in a reference that stays": given(reference_mixup_alpha=0.6),
    "steps between syncs of a reference that stays": given(reference_sync_steps=64),
    "a reference that follows, with simpo": given(loss_type="simpo", sync_reference="true"),
    "a share above 1": given(sync_reference="true", reference_mixup_alpha=1.5),
    "a reference that is not there": given(reference_model_name_or_path="./typo"),
    "a reference model that follows the policy": given(
        reference_model_name_or_path="./model", sync_reference="true"
    ),
    "a revision of no reference model": given(reference_model_revision="main"),
    "a revision of a reference in a folder": given(
        reference_model_name_or_path="./model", reference_model_revision="main"
    ),
    "a reference with other tokens": Mistake(
        {"reference_model_name_or_path": "other"}, (), {**OTHER_TOKENS}
    ),
    "a reference without a tokenizer": Mistake(
        {"reference_model_name_or_path": "other"},
        (),
        {name: OTHER_TOKENS[name] for name in ("other/config.json", "other/model.safetensors")},
        cut=r"be loaded \(.*\); check",
    ),
    "a reference with fewer tokens": Mistake(
        {"reference_model_name_or_path": "other"},
        (),
        {
            **{name: from_model(name) for name in OTHER_TOKENS},
            "other/config.json": changed_json("model/config.json", vocab_size=40),
        },
    ),
    "no steps between syncs": given(sync_reference="true", reference_sync_steps=0),
    # ---- adapters
    "settings of adapters without adapters": given(lora_alpha=32, use_dora="true"),
    "an adapter to go on with, without adapters": given(adapter_name_or_path="./sft"),
    "layers that the model has not": given(use_lora="true", lora_target_modules="[q_prj, v_proj]"),
    "a layer that is not linear": given(use_lora="true", lora_target_modules="[self_attn]"),
    "a name of a layer for a pattern": given(use_lora="true", lora_target_modules="q_proj"),
    "a pattern that is none": given(use_lora="true", lora_target_modules="(q|v_proj"),
    "a whole layer that the model has not": given(use_lora="true", modules_to_save="lm_hed"),
    "adapters of no rank, with dropout of all": given(
        use_lora="true", lora_r=0, lora_alpha=0, lora_dropout=1.0
    ),
    "an unknown start of adapters": given(use_lora="true", init_lora_weights="pisa"),
    "singular directions that the model has not": given(
        use_lora="true", init_lora_weights="pissa", lora_r=64
    ),
    "another task": given(use_lora="true", lora_task_type="SEQ_CLS"),
    "a rank beside an adapter that has one": given(
        use_lora="true", adapter_name_or_path="./sft", lora_r=8, lora_target_modules="all-linear"
    ),
    "an adapter that is not there": given(use_lora="true", adapter_name_or_path="./sft"),
    "a model for an adapter": given(use_lora="true", adapter_name_or_path="./model"),
    "a pickled adapter": Mistake(
        {"use_lora": "true", "adapter_name_or_path": "sft"},
        (),
        {"sft/adapter_config.json": '{"peft_type": "LORA"}', "sft/adapter_model.bin": b"x"},
    ),
    "an adapter of another kind": Mistake(
        {"use_lora": "true", "adapter_name_or_path": "sft"},
        (),
        {"sft/adapter_config.json": '{"peft_type": "IA3"}', "sft/adapter_model.safetensors": b"x"},
    ),
    "a revision of a new adapter": given(use_lora="true", adapter_revision="main"),
    "adapters and a reference that follows": given(use_lora="true", sync_reference="true"),
    "dropout of adapters in rows that are shared out": given(
        use_lora="true", lora_dropout=0.1, sequence_parallel_size=2
    ),
    # ---- quantisation
    "4 and 8 bits": given(use_lora="true", load_in_4bit="true", load_in_8bit="true"),
    "quantised weights that shall train": given(load_in_4bit="true"),
    "settings of 4 bits without them": given(
        use_lora="true",
        load_in_8bit="true",
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant="false",
    ),
    "an unknown kind of 4 bits": given(
        use_lora="true", load_in_4bit="true", bnb_4bit_quant_type="int4"
    ),
    "4 bits that an engine would cut": given(
        use_lora="true", load_in_4bit="true", fsdp="full_shard"
    ),
    "8 bits that ZeRO-3 would cut": given(use_lora="true", load_in_8bit="true", zero_stage=3),
    "4 bits of a GGUF file": given(
        use_lora="true", load_in_4bit="true", model_name_or_path="m.gguf"
    ),
    "4 bits of a reference in a GGUF file": given(
        use_lora="true", load_in_4bit="true", reference_model_name_or_path="m.gguf"
    ),
    "what pissa takes out of 4 bits": given(
        use_lora="true", load_in_4bit="true", init_lora_weights="pissa"
    ),
    "fp16 in 4 bits without a loss scale": given(
        use_lora="true", load_in_4bit="true", bnb_4bit_compute_dtype="float16"
    ),
    "4 bits without their package": given(use_lora="true", load_in_4bit="true"),
    "a layer in 4 bits that shall train whole": Mistake(
        {"use_lora": "true", "load_in_4bit": "true", "modules_to_save": "[lm_head, mlp]"},
        packages=("bitsandbytes",),
    ),
    "a model that is quantised already": Mistake(
        {"use_lora": "true", "load_in_4bit": "true"},
        (),
        {
            "model/config.json": changed_json(
                "model/config.json", quantization_config={"quant_method": "gptq", "bits": 4}
            )
        },
        packages=("bitsandbytes",),
    ),
    "layouts that contradict": given(concatenated_forward="true", forward_layout="separate"),
    "a prompt longer than the whole": given(max_length=64, max_prompt_length=128),
    "offload on a CPU": given(activation_offload="true", gradient_checkpointing="true"),
    "offload of what is kept": given(activation_offload="true"),
    "another kind of checkpointing": given(gradient_checkpointing="partly"),
    "knob of another optimizer": given(optimizer="adafactor", adam_beta1="0.9"),
    "paged optimizer on a CPU": given(optimizer="paged_adamw_8bit"),
    "rounding of float32 weights": given(stochastic_rounding="true"),
    "optimizer under ZeRO": given(optimizer="muon", zero_stage="2"),
    "use_cache with checkpointing": given(use_cache="true", gradient_checkpointing="true"),
    "nothing to fill the cache with": given(cache_dataset_only="true", dataset_cache_mode="off"),
    "more processes to a row than heads": given(sequence_parallel_size=8),
    "a row for no process": given(sequence_parallel_size=0),
    "padded pairs shared out": given(sequence_parallel_size=2, concatenated_forward="true"),
    "a kernel without packed rows, shared out": given(
        sequence_parallel_size=2, attn_implementation="eager"
    ),
    "dropout in rows that are shared out": given(sequence_parallel_size=2, disable_dropout="false"),
    # ---- which data
    "two data sources": given(dataset_mixer="{pairs.jsonl: 1.0}"),
    "no data source": given(dataset_name=LEFT_OUT),
    "an amount of 0": given(dataset_name=LEFT_OUT, dataset_mixer="{pairs.jsonl: 0}"),
    "an amount of -1": given(dataset_name=LEFT_OUT, dataset_mixer_list="[pairs.jsonl, -1]"),
    "a list without its last amount": given(
        dataset_name=LEFT_OUT, dataset_mixer_list="[pairs.jsonl, 0.5, other.jsonl]"
    ),
    "absent sources of a mix": given(
        dataset_name=LEFT_OUT,
        dataset_mixer="{pairs.jsonl: 0.5, absent.jsonl: 0.5, ./gone: 10}",
    ),
    "an absent file": given(dataset_name="absent.jsonl"),
    "an absent file to evaluate on": given(test_size=LEFT_OUT, eval_dataset="absent.jsonl"),
    "a dataset of the Hub without a network": given(dataset_name="nobody/pairs"),
    "a kind of file that is not read": with_data("a line", name="d.txt"),
    "a folder without data": with_data("a line", name="d/notes.txt", dataset_name="d"),
    "a folder without the split": with_data(make_pairs(3), name="d/test.jsonl", dataset_name="d"),
    "a split of one file": given(dataset_split="validation"),
    "a label with a slash": given(test_size=LEFT_OUT, eval_dataset="{a/b: pairs.jsonl}"),
    "everything held out": given(test_size=21),
    "a test_size of 1.0": given(test_size=1.0),
    # ---- rows
    "an empty file": with_data(""),
    "broken JSON on line 7": Mistake(
        {"dataset_name": "d.jsonl"}, (), {"d.jsonl": broken_line}, cut=r"(?<=JSON \()[^)]*\)"
    ),
    "text that is not UTF-8": with_data('{"prompt": "caf\xe9"}\n'.encode("latin-1")),
    "a missing column": with_data(
        [{"prompt": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in TEXT_PAIRS]
    ),
    "a column map of an absent column": given(column_map="{chosen: good}"),
    "a column map of an unknown column": given(column_map="{chosn: good}"),
    "a number where text belongs": with_data(rows_with(4, chosen=17)),
    "messages in ShareGPT's layout": with_data(
        rows_with(1, prompt=[{"from": "human", "value": "q"}])
    ),
    "equal answers": with_data(rows_with(2, **chat_row("q", "same", "same"))),
    "an empty answer": with_data(rows_with(3, chosen=[{"role": "assistant", "content": " "}])),
    "a prompt of messages, answers of text": with_data(rows_with(5, chosen="Yes.", rejected="No.")),
    "a last message that is not the assistant's": with_data(rows_with(6, chosen=[user("Yes.")])),
    "a text prompt that the answers repeat": with_data(
        [{k: v if k == "prompt" else r["prompt"] + v for k, v in r.items()} for r in TEXT_PAIRS]
    ),
    "a prompt that the answers repeat without its system message": with_data(
        [
            {"prompt": [{"role": "system", "content": "s"}, *row["prompt"]]}
            | {side: row["prompt"] + row[side] for side in SIDES}
            for row in make_pairs(10)
        ]
    ),
    "a text prompt that ends in a space": with_data(
        [
            {"prompt": row["prompt"] + " "} | {side: " " + row[side] for side in SIDES}
            for row in TEXT_PAIRS
        ]
    ),
    "all rows over length": given(max_length=5),
    "rows longer than the model's positions": with_data(
        [*make_pairs(8), *make_pairs(1, completion_words=(600, 600))]
    ),
    "a weight of text": with_data(rows_with(3, weight="2")),
    "a weight that is true": with_data(rows_with(3, weight=True)),
    "a weight below 0": with_data(rows_with(3, weight=-0.5)),
    "a margin that is no number": with_data(rows_with(3, margin=float("nan"))),
    # ---- rows of one answer
    "a knob of a loss for a stage without one": given(
        "--stage", "sft", "--beta", "0.1", "--loss_type", "dpo"
    ),
    "pairs where conversations are read": with_data(rows_with(1), stage="sft"),
    "conversations for a loss on pairs": with_data(
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    ),
    "rows of one answer for a loss on pairs": with_data(LONE_ANSWERS),
    "a label of text": lone_answers(2, label="good"),
    "a label of 0.5": lone_answers(2, label=0.5),
    "a label that is null": lone_answers(2, label=None),
    "a label under another name": lone_answers(0, column_map="{label: liked}"),
    "an answer without its prompt": lone_answers(2, prompt=None),
    "a label without an answer": lone_answers(2, completion=None),
    "a pair with one equal answer among rows of one answer": lone_answers(
        2, **chat_row("q", "same", "same")
    ),
    # ---- transforms
    "an unknown transform": given(dataset_transforms="[strip_blanks]"),
    "a transform of an absent module": given(dataset_transforms="[no_such_rows:clean]"),
    "a transform that returns nothing": Mistake(
        {"dataset_transforms": "[mistaken_rows:forgets]"},
        (),
        {"mistaken_rows.py": "def forgets(row):\n    row['prompt'] = 'x'\n"},
    ),
    # ---- model, tokenizer and template
    "a wrong path of the model": given(model_name_or_path="./no/such/model"),
    "no model": given(model_name_or_path=LEFT_OUT),
    "a model folder without weights": Mistake(files={"model/model.safetensors": None}),
    "a model folder without its config": Mistake(files={"model/config.json": None}),
    "a model whose config is broken": Mistake(
        files={"model/config.json": "{"}, cut=r"(?<=loaded \().*(?=\); check)"
    ),
    "a model of the Hub without a network": Mistake(
        {"model_name_or_path": "nobody/model"}, cut=r"(?<=loaded \().*(?=\); check)"
    ),
    "a revision of a folder": given(model_revision="main"),
    "a revision of no tokenizer": given(tokenizer_revision="main"),
    "an absent tokenizer": Mistake(
        {"tokenizer_name_or_path": "./absent"}, cut=r"(?<=loaded \().*(?=\); check)"
    ),
    "a tokenizer of another model": Mistake(
        files={"model/config.json": changed_json("model/config.json", vocab_size=200)}
    ),
    "an unknown template": given(chat_template="chatlm"),
    "a template in an absent file": given(chat_template="./absent.jinja"),
    "a template without a stop token": Mistake(
        {"chat_template": "t.jinja"}, (), {"t.jinja": NO_STOP_TEMPLATE}
    ),
    "a template that fails": Mistake(
        {"chat_template": "t.jinja"},
        (),
        {"t.jinja": "{{ raise_exception('not today') }}"},
    ),
    "messages without a template": Mistake(files={"model/chat_template.jinja": None}),
    "a template for plain text": with_data(TEXT_PAIRS, chat_template="chatml"),
    # ---- the device
    "flash attention without a GPU": given(attn_implementation="flash_attention_2"),
    "flash attention without its package": Mistake(
        {"attn_implementation": "flash_attention_2", "mixed_precision": "bf16"}, device=NEW_GPU
    ),
    "flash attention for fp32 products": Mistake(
        {"attn_implementation": "flash_attention_2"}, device=NEW_GPU, packages=("flash_attn",)
    ),
    "a kernel of packed rows without a GPU": given(attn_implementation="flex"),
    "a kernel of packed rows for fp32 products": Mistake(
        {"attn_implementation": "varlen"}, device=NEW_GPU
    ),
    "a kernel of packed rows for padded pairs": given(
        attn_implementation="varlen", concatenated_forward="true"
    ),
    "bf16 products on a GPU without them": Mistake({"mixed_precision": "bf16"}, device=OLD_GPU),
    "fp16 products of bf16 weights": given(mixed_precision="fp16", dtype="bfloat16"),
    "bf16 weights on a GPU without bf16": Mistake({"dtype": "bfloat16"}, device=OLD_GPU),
    # ---- folders
    "a foreign output_dir": Mistake(files={"run/thesis.tex": "years of work"}),
    "another configuration in output_dir": Mistake(
        {"learning_rate": 5e-4, "beta": 0.3},
        (),
        {"run/run.json": manifest(test_size=4, num_epochs=1.0)},
    ),
    "a manifest of something else": Mistake(files={"run/run.json": '{"name": "another tool"}'}),
    "resume never in a folder with a run": Mistake(
        {"resume": "never"}, (), {"run/run.json": manifest()}
    ),
    "an absent checkpoint": given(resume="./nowhere"),
    "a file for a cache": Mistake({"cache_dir": "c"}, (), {"c": ""}),
    # ---- several at once
    "three in the file and two on the command line": Mistake(
        {"beta": -1, "resum": "auto"},
        ("c.yaml",),
        {"c.yaml": "learning_rte: 1\noptimizer: adam\nmax_length: 0\n"},
    ),
    "folders, device, template and data": Mistake(
        {
            "attn_implementation": "flash_attention_2",
            "chat_template": "./absent.jinja",
            "cache_dir": "c",
            "dataset_name": LEFT_OUT,
            "dataset_mixer": "{absent.jsonl: 0.5, gone.csv: 10}",
        },
        (),
        {"run/thesis.tex": "years of work", "c": ""},
    ),
    "rows of several sources": Mistake(
        {
            "dataset_name": LEFT_OUT,
            "dataset_mixer": "{a.jsonl: 1.0, pairs.jsonl: 1.0, b.jsonl: 3}",
            "test_size": LEFT_OUT,
            "eval_dataset": "{held: c.jsonl, gone: absent.jsonl}",
        },
        (),
        {
            "a.jsonl": rows_with(4, chosen=17),
            "b.jsonl": rows_with(2, **chat_row("q", "same", "same")),
            "c.jsonl": "",
        },
    ),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """The files of a run; its weights cannot be read, so whoever touches them fails."""
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_settings(folder)
    (folder / "model" / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.fixture
def root(template, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


def make_files(root: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        if content is None:
            path.unlink()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(content(root) if callable(content) else content)


def tree(root: Path) -> dict[str, bytes]:
    """Every file with its content, without tokenised rows: that cache is there to be filled."""
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in sorted(files.items())
        if not name.startswith("cache/datasets/")
    }


def words_of(mistake: Mistake, root: Path) -> list[str]:
    settings = tiny_settings(root, num_epochs=1.0, test_size=4) | dict(mistake.options)
    given = {key: value for key, value in settings.items() if value is not LEFT_OUT}
    return [*mistake.words, *arguments(given)]


def said_by(command: str, mistake: Mistake, root: Path, capsys: Any) -> str:
    """What a command says of a mistake, which may load and change nothing."""
    before = tree(root)
    code = main([command, *words_of(mistake, root)])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("preftune: error: ")
    assert "Traceback" not in err
    assert tree(root) == before
    return re.sub(mistake.cut, "…", err.replace(str(root), "<tmp>"))


def sections(text: str) -> dict[str, str]:
    """mistakes.txt as name -> message."""
    parts = re.split(r"^=== (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], (part.rstrip("\n") + "\n" for part in parts[2::2]), strict=True))


def compare(name: str, said: str) -> None:
    stored = sections(SNAPSHOTS.read_text("utf-8")) if SNAPSHOTS.exists() else {}
    if os.environ.get("PREFTUNE_WRITE_MISTAKES"):
        stored[name] = said
        order = [*MISTAKES, *CACHES]
        lines = [f"=== {key}\n{stored[key]}\n" for key in order if key in stored]
        SNAPSHOTS.write_text("".join(lines), "utf-8")
    else:
        assert said == stored[name]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(name, root, capsys, monkeypatch):
    mistake = MISTAKES[name]
    for function, value in mistake.device.items():
        monkeypatch.setattr(torch.cuda, function, lambda value=value, **_: value)
    installed = {package: object() for package in mistake.packages}
    monkeypatch.setattr(preflight, "find_spec", installed.get)
    make_files(root, mistake.files)
    said = {command: said_by(command, mistake, root, capsys) for command in ("check", "train")}
    if said["check"] == said["train"]:
        compare(name, said["check"])
    else:
        compare(name, f"check: {said['check']}train: {said['train']}")


# ---------------------------------------------------------------- a cache that cannot be written

CACHES = {
    "a cache that is read-only": "ro,size=1m",
    "a cache that is full in the middle": "size=64k",
}
"""Options of the file system that the cache is on: rights mean nothing to root."""

BOTH_COMMANDS = (
    "import sys; from preftune.cli.main import main; words = sys.argv[1:]; "
    "print([main([command, *words]) for command in ('check', 'train')])"
)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.skipif(not can_mount(), reason="this process may not mount a file system")
def test_a_cache_that_cannot_be_written(name, root):
    make_files(root, {"pairs.jsonl": make_pairs(200), "cache/.keep": ""})
    script = f'mount -t tmpfs -o {CACHES[name]} tmpfs "$0" && exec "$@"'
    words = words_of(Mistake(), root)
    command = [*IN_A_NAMESPACE, "sh", "-c", script, str(root / "cache")]
    before = tree(root)
    result = subprocess.run(
        [*command, sys.executable, "-c", BOTH_COMMANDS, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "[2, 2]\n", result.stderr
    assert "Traceback" not in result.stderr
    assert tree(root) == before
    said = result.stderr.replace(str(root), "<tmp>")
    said = re.sub(r"(?<=datasets/)[0-9a-f]{32}", "<key>", said)
    said = re.sub(r"(?<=written \().*(?=\); free)", "…", said)  # in Arrow's words
    first, second = said.split("preftune: error: ")[1:]  # before them libraries may speak
    assert first == second
    compare(name, f"preftune: error: {first}")


def test_no_stored_message_is_left_of_a_mistake_that_is_gone():
    stored = sections(SNAPSHOTS.read_text("utf-8"))
    assert list(stored) == [*MISTAKES, *CACHES]
    assert "<tmp>" in str(stored)
    assert "/tmp/" not in str(stored)


# ---------------------------------------------------------------- what is no mistake, but is told


def test_5e_7_is_a_number_quoted_or_not(root, capsys):
    for text in ("5e-7", "'5e-7'"):
        make_files(root, {"c.yaml": f"learning_rate: {text}\n"})
        settings = tiny_settings(root)
        del settings["learning_rate"]
        assert main(["check", "c.yaml", *arguments(settings)]) == 0
        assert "learning_rate: 5.0e-07  # c.yaml line 1\n" in capsys.readouterr().out


def test_rows_without_a_template_are_said(root, capsys):
    make_files(root, {"text.jsonl": TEXT_PAIRS})
    options = {"dataset_name": "text.jsonl", "test_size": 4}
    assert main(["check", *arguments(tiny_settings(root) | options)]) == 0
    printed = capsys.readouterr().out
    assert "6 are plain text, without a chat template" in printed


def test_a_precision_that_the_cpu_computes_in_software_is_said_aloud(root, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    words = arguments(tiny_settings(root, mixed_precision="bf16", progress="plain"))
    assert main(["check", *words]) == 0
    told = "mixed_precision is 'bf16', which this CPU computes in software, far slower than fp32"
    assert told in capsys.readouterr().out
    assert main(["train", *words]) == 2  # the weights cannot be read
    assert told in capsys.readouterr().err


def test_processes_that_make_no_group(root, capsys, monkeypatch):
    """`check` without a launcher takes as many as there must be, and does not look for them."""
    words = arguments(tiny_settings(root, sequence_parallel_size=2))
    assert main(["check", *words]) == 0
    told = "pairs a step: 8 = 4 x 2 accumulated x 1 groups of 2 processes\n"
    assert told in capsys.readouterr().out
    assert main(["train", *words]) == 2
    one = "sequence_parallel_size is 2, and 1 process runs; start a multiple of it, or set it to "
    assert one in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["check", *words]) == 2
    three = one.replace("1 process runs", "3 processes run")
    assert three in capsys.readouterr().err


def test_check_prints_what_the_run_would_do(root, capsys):
    settings = tiny_settings(root)
    assert main(["check", *arguments(settings)]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate: 0.001  # command line\n" in printed
    assert "\nbeta: 0.1\n" in printed
    defaults = printed.partition("defaults: ")[2].partition("pairs.jsonl:")[0]
    assert "beta" in defaults
    assert "learning_rate" not in defaults
    assert "pairs a step: 8 = 4 x 2 accumulated x 1 processes\nsteps: 6 (3 an epoch)\n" in printed
    pattern = r"tokens, each prompt counted for both sides: (\d+) \((\d+) an epoch\)"
    tokens = re.search(pattern, printed)
    assert tokens is not None
    assert int(tokens[1]) == 2 * int(tokens[2])


def test_check_counts_answers_where_the_loss_trains_on_single_ones(root, capsys):
    assert main(["check", *arguments(tiny_settings(root, test_size=4, loss_type="bco"))]) == 0
    printed = capsys.readouterr().out
    assert "pairs.jsonl: 38 rows read, 38 kept" in printed
    assert "pairs.jsonl: 4 rows read, 4 kept" in printed
    assert "rows a step: 8 = 4 x 2 accumulated x 1 processes\nsteps: 10 (5 an epoch)\n" in printed
    assert "tokens, each prompt counted once an answer: " in printed
    assert "tokens of a prompt and its answer: median " in printed
