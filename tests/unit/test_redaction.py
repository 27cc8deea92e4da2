"""Secrets go, and everything else stays."""

import pytest

from preftune.redaction import HIDDEN, redacted, redacted_values


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://me:s3cret@host/org/x", "https://REDACTED@host/org/x"),
        ("https://token@host/x?split=train", "https://REDACTED@host/x?split=train"),
        ("https://host/x?token=abc&split=a", "https://host/x?token=REDACTED&split=a"),
        ("s3://bucket/x?X=1&signature=abc#f", "s3://bucket/x?X=1&signature=REDACTED#f"),
        ("--name hf_" + "a" * 34, "--name REDACTED"),
        ("sk-ant-api03-" + "a" * 40, "REDACTED"),
        ("AKIAIOSFODNN7EXAMPLE", "REDACTED"),
    ],
)
def test_known_forms_go(text, left):
    assert redacted(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "/data/pairs.jsonl",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "org/name:subset@revision",
        "https://host/path/x.jsonl",
        "me@example.com",
        "hf_dataset",
        "risk-free",
        "the token budget is 4096",
    ],
)
def test_ordinary_names_stay(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("name", "value", "goes"),
    [
        ("HF_TOKEN", "0123456789", True),
        ("MY_SECRET", "0123456789", True),
        ("AWS_SECRET_ACCESS_KEY", "0123456789", True),
        ("SERVICE_API_KEY", "0123456789", True),
        ("HF_TOKEN", "short", False),
        ("HF_TOKEN_PATH", "0123456789", False),
        ("HF_TOKEN", "/home/me/token", False),
        ("TOKENIZERS_PARALLELISM", "0123456789", False),
        ("KEYBOARD", "0123456789", False),
        ("PWD", "0123456789", False),
    ],
)
def test_values_of_variables_go_by_the_variables_name(monkeypatch, name, value, goes):
    monkeypatch.setenv(name, value)
    assert redacted(f"a {value} b") == (f"a {HIDDEN} b" if goes else f"a {value} b")


def test_values_keep_their_shape():
    value = {"https://a:b@c": [1, None, ("https://a:b@c", 2.5)], "x": True}
    assert redacted_values(value) == {
        "https://REDACTED@c": [1, None, ["https://REDACTED@c", 2.5]],
        "x": True,
    }
