"""The tests' own helpers: what other test modules count on."""

import os
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import END_OF_TEXT, IM_END, make_pairs, tiny_model, tiny_tokenizer


def test_any_text_survives_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    for text in ("The capital of France", "é✓🙂\n\t x", "日本"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_bos_is_put_in_front() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    assert tokenizer.bos_token == END_OF_TEXT
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tiny_tokenizer()("a")["input_ids"] == tokenizer("a")["input_ids"][1:]


def test_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    text = f"The cat{IM_END}"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_model_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.lm_head.weight, two.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.dtype == torch.float32
    tied = tiny_model(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert one(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, len(tiny_tokenizer()))


def test_pairs_have_very_different_lengths() -> None:
    rows = make_pairs(50, seed=1)
    assert rows == make_pairs(50, seed=1) != make_pairs(50, seed=2)
    lengths = [len(row["chosen"][0]["content"]) for row in rows]
    assert max(lengths) > 10 * min(lengths)
    assert len({row["prompt"][0]["content"] for row in make_pairs(9, prompts=3)}) == 3


def test_network_is_blocked_and_this_machine_is_not() -> None:
    with pytest.raises(OSError, match="may not reach the network"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as s, pytest.raises(OSError, match="may not reach the network"):
        s.connect(("192.0.2.1", 80))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert "preftune-cache" in os.environ["PREFTUNE_CACHE"]
