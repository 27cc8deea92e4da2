"""The plan of a 1 B model against what the same run allocates on a GPU."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune import train
from preftune.config.planning import PlanConfig
from preftune.recipes.plan import plan
from tests.runs import read_metrics
from tests.tiny import make_pairs, tiny_tokenizer, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GIB = 2**30
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("planning")
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).cpu().save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    pairs = make_pairs(16, prompt_words=(100, 120), completion_words=(150, 200))
    write_jsonl(root / "train.jsonl", pairs)
    return root


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_lora": True}, {"use_lora": True, "load_in_4bit": True}],
    ids=["full", "LoRA", "QLoRA"],
)
def test_tensors_within_a_tenth(files, tmp_path, options, checkpointing):
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    config = PlanConfig(
        model_name_or_path=str(files / "model"),
        dataset_name=str(files / "train.jsonl"),
        cache_dir=str(tmp_path / "cache"),
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=4,
        max_train_steps=2,
        logging_steps=1,
        checkpointing_steps=None,
        gradient_checkpointing=checkpointing,
        progress="none",
        **options,
    )
    found, _ = plan(config)
    parts = dict(found.division.fullest.parts)
    del parts["allocator"]  # the run says what is allocated, without what the allocator keeps
    torch.cuda.reset_peak_memory_stats()
    train(config.experiment())
    measured = max(line["perf/peak_memory_gib"] for line in read_metrics(tmp_path / "run"))
    assert sum(parts.values()) / GIB == pytest.approx(measured, rel=0.1)
