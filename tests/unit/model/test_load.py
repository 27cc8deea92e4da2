"""Loading says what is wrong; saving gives back what the source was."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from preftune import train
from preftune.config.model import ModelConfig
from preftune.errors import ModelError
from preftune.model.load import load_model
from tests.runs import tiny_config, tiny_model_folder
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.model.test_forward import ARCHITECTURES, make_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return tiny_model_folder(tmp_path / "model")


def test_weights_that_are_absent_are_not_made_up(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(ModelConfig(model_name_or_path=str(folder)), CPU)


def test_damaged_weights_are_the_users_error(folder):
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="model_name_or_path is"):
        load_model(ModelConfig(model_name_or_path=str(folder)), CPU)


def test_dropout_is_off_in_training_and_back_in_the_saved_config(tmp_path):
    tiny_model(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path)
    loaded = load_model(config, CPU)
    layer = loaded.policy.model.model.layers[0].self_attn
    assert layer.attention_dropout == 0.0
    ids = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        still = loaded.policy.model(input_ids=ids).logits
        loaded.policy.train()
        assert torch.equal(loaded.policy.model(input_ids=ids).logits, still)
    final = train(config).folder.final
    assert json.loads((final / "config.json").read_text())["attention_dropout"] == 0.5


def test_dropout_stays_where_it_is_wanted(tmp_path):
    tiny_model(attention_dropout=0.5).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load_model(tiny_config(tmp_path, disable_dropout=False), CPU)
    ids = torch.arange(1, 20).unsqueeze(0)
    loaded.policy.train()
    with torch.no_grad():
        once, again = (loaded.policy.model(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(once, again)


@pytest.mark.parametrize(
    ("source", "save_dtype", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("float32", "auto", torch.float32),
        ("bfloat16", "float32", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_final_is_stored_like_its_source_or_as_asked(tmp_path, source, save_dtype, expected):
    tiny_model(dtype=getattr(torch, source)).to(getattr(torch, source)).save_pretrained(
        tmp_path / "model"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    config = tiny_config(tmp_path, save_dtype=save_dtype, max_train_steps=1, num_epochs=None)
    assert next(load_model(config, CPU).policy.parameters()).dtype == torch.float32
    final = train(config).folder.final
    weights = load_file(final / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert AutoConfig.from_pretrained(final).dtype == expected


def test_tied_weights_are_saved_once(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    final = train(tiny_config(tmp_path, save_dtype="bfloat16")).folder.final
    assert "lm_head.weight" not in load_file(final / "model.safetensors")
    loaded = load_model(ModelConfig(model_name_or_path=str(final)), CPU).policy.model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_numbers_a_model_has_the_same_shapes_and_ties(tmp_path, name):
    make_model(name).save_pretrained(tmp_path)
    config = ModelConfig(model_name_or_path=str(tmp_path), dtype="bfloat16")
    whole = load_model(config, torch.device("cpu")).policy.model
    empty = load_model(config, torch.device("meta")).policy.model
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert described(empty) == described(whole)


def described(model) -> list[tuple]:
    """Names, shapes, dtypes, and which names stand for one tensor."""
    tensors = model.state_dict(keep_vars=True) | dict(model.named_buffers())
    first: dict[int, str] = {}
    return [
        (name, first.setdefault(id(t), name), t.shape, t.dtype, t.requires_grad)
        for name, t in tensors.items()
    ]
