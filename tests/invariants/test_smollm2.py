"""The real model on real pairs: SmolLM2-135M-Instruct on `pandalm-human`, in fp32.

Needs `$PREFTUNE_DATA`, and the embedded model in the cache (`preftune quickstart` puts it there) or
its folder in `$PREFTUNE_MODEL`. Takes some ten minutes on two cores.
"""

import math
import os
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune import ExperimentConfig, train
from preftune.batching.layout import build_layout
from preftune.config.model import ModelConfig
from preftune.model.forward import pair_logps
from preftune.model.load import load_model
from tests.runs import read_metrics

# Read before the tests' own cache folder is put in its place.
_CACHE = Path(os.environ.get("PREFTUNE_CACHE", "~/.cache/preftune")).expanduser()
MODEL = Path(os.environ.get("PREFTUNE_MODEL", _CACHE / "models" / "SmolLM2-135M-Instruct"))
DATA = Path(os.environ.get("PREFTUNE_DATA", "absent")) / "pandalm-human"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="PREFTUNE_DATA holds no pandalm-human"),
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(),
        reason=f"no model in {MODEL}; run `preftune quickstart` once, or set PREFTUNE_MODEL",
    ),
]


def load_rows(num_rows: int):
    from preftune.data.pairs import load_pairs

    return load_pairs(
        str(DATA / "train.jsonl"),
        column_map=None,
        tokenizer=AutoTokenizer.from_pretrained(MODEL),
        max_length=1024,
        max_prompt_length=None,
        truncation="drop",
        max_dropped_fraction=0.0,
        max_rows=num_rows,
    ).examples


@torch.no_grad()
def test_log_probs_equal_plain_cross_entropy_on_unpadded_rows():
    policy = load_model(ModelConfig(model_name_or_path=str(MODEL)), torch.device("cpu")).policy
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    examples = load_rows(12)
    result = pair_logps(policy, build_layout(examples, "concatenated"))
    answers = [(e.prompt_ids, c.ids) for e in examples for c in e.completions]
    worst_token = worst_sum = 0.0
    for index, (prompt, completion) in enumerate(answers):
        logits = plain(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        labels = torch.tensor(completion)
        expected = -F.cross_entropy(logits[len(prompt) - 1 : -1].double(), labels, reduction="none")
        difference = (result.per_token[index].double() - expected).abs()
        worst_token = max(worst_token, float(difference.max()))
        excess = abs(float(result.sums[index]) - float(expected.sum()))
        worst_sum = max(worst_sum, excess / (1e-4 + 1e-6 * abs(float(expected.sum()))))
    print(f"largest difference of a token: {worst_token:.2e} nats")
    print(f"largest difference of a sum, as a share of 1e-4 + 1e-6 |logp|: {worst_sum:.2f}")
    assert worst_token <= 1e-4
    assert worst_sum <= 1.0


def test_training_starts_at_ln_2_and_learns(tmp_path):
    config = ExperimentConfig(
        model_name_or_path=str(MODEL),
        dataset_name=str(DATA / "train.jsonl"),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        mixed_precision="fp32",
        per_device_train_batch_size=4,
        max_train_steps=40,
        max_train_samples=160,
        learning_rate=5e-6,
        logging_steps=1,
        checkpointing_steps=None,
        progress="plain",
    )
    result = train(config)
    lines = read_metrics(result.folder.root)
    losses = [line["loss"] for line in lines]
    early, late = statistics.mean(losses[:10]), statistics.mean(losses[-10:])
    print(f"first loss - ln 2: {losses[0] - math.log(2):.2e}")
    print(f"rewards at step 1: {lines[0]['rewards/chosen']:.2e} {lines[0]['rewards/rejected']:.2e}")
    print(f"mean loss of the first and last ten steps: {early:.4f} {late:.4f} ({late / early:.3f})")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(lines[0]["rewards/chosen"]) <= 1e-4
    assert abs(lines[0]["rewards/rejected"]) <= 1e-4
    assert len(losses) == 40
    assert late < 0.95 * early
    model = AutoModelForCausalLM.from_pretrained(result.folder.final)
    tokenizer = AutoTokenizer.from_pretrained(result.folder.final)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"answer of final/: {answer}")
    assert answer.strip()
