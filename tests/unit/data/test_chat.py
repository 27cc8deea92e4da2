"""Built-in chat templates, and what a template is found to write around answers."""

from pathlib import Path

import pytest

from preftune.data.chat import (
    TemplateRefused,
    answer_frame,
    builtin_templates,
    render,
    set_chat_template,
    shows_tools,
)
from preftune.errors import ConfigError, DataError
from tests.tiny import CHATML, END_OF_TEXT, IM_END, tiny_tokenizer

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n",
        ),
        ("tulu", "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA<|im_end|>\n"),
        ("zephyr", "<|system|>\nS<|im_end|>\n<|user|>\nQ<|im_end|>\n<|assistant|>\nA<|im_end|>\n"),
    ],
)
def test_builtin_templates(name: str, text: str) -> None:
    tokenizer = tiny_tokenizer(None)
    set_chat_template(tokenizer, name)
    assert render(tokenizer, CHAT) == text
    prompt = render(tokenizer, CHAT[:2], open_answer=True)
    assert text.startswith(prompt)
    assert text[len(prompt) :] == "A<|im_end|>\n"
    frame = answer_frame(tokenizer)
    assert (frame.lead, frame.stop, frame.trailer) == ("", IM_END, "\n")
    assert frame.stop_id == tokenizer.eos_token_id


def test_names() -> None:
    assert builtin_templates() == ["alpaca", "chatml", "llama3", "plain", "tulu", "zephyr"]


@pytest.mark.parametrize("name", ["tulu", "zephyr"])
def test_builtin_templates_refuse_roles_they_do_not_write(name: str) -> None:
    tokenizer = tiny_tokenizer(None)
    set_chat_template(tokenizer, name)
    with pytest.raises(TemplateRefused, match="no role tool"):
        render(tokenizer, [*CHAT, {"role": "tool", "content": "x"}])


def test_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    tokenizer = tiny_tokenizer(None)
    set_chat_template(tokenizer, str(path))
    assert tokenizer.chat_template == CHATML


def test_unknown_name_lists_the_names_and_suggests_one() -> None:
    with pytest.raises(ConfigError) as caught:
        set_chat_template(tiny_tokenizer(None), "chatlm")
    assert "did you mean 'chatml'?" in str(caught.value)
    assert "alpaca, chatml, llama3, plain, tulu, zephyr" in str(caught.value)
    with pytest.raises(ConfigError, match="neither a built-in template nor a file or folder"):
        set_chat_template(tiny_tokenizer(None), "no/such.jinja")


@pytest.mark.parametrize(
    "text", ["{% for %}", "{{ raise_exception('never') }}", "no content at all", b"\xff"]
)
def test_template_that_does_not_work_leaves_the_old_one(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "bad.jinja"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match=r"bad\.jinja"):
        set_chat_template(tokenizer, str(path))
    assert tokenizer.chat_template == CHATML


def test_no_chat_template_says_which_option_sets_one() -> None:
    with pytest.raises(DataError, match=r"--chat_template NAME \(alpaca, chatml, "):
        answer_frame(tiny_tokenizer(None))


HEADER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "lead", "stop", "trailer"),
    [
        (HEADER + "{{ '<|im_end|>' }}{% endfor %}" + OPEN, "", IM_END, ""),
        (HEADER + "{{ ' <|im_end|>\n\n' }}{% endfor %}" + OPEN, "", " " + IM_END, "\n\n"),
        (HEADER + "{{ '\n' }}{% endfor %}" + OPEN, "", "", "\n"),
        (HEADER + "{% endfor %}" + OPEN, "", "", ""),
        (
            HEADER + "{{ '<|im_end|><|endoftext|>' }}{% endfor %}" + OPEN,
            "",
            IM_END,
            END_OF_TEXT,
        ),
        # add_generation_prompt ignored: the header is no part of the answer.
        (HEADER + "{{ '<|im_end|>\n' }}{% endfor %}", "<|im_start|>assistant\n", IM_END, "\n"),
        # A blank alone belongs to the answer: it is one token with the answer's first word.
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[' + m['content'] + ']' }}"
            "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}",
            "",
            IM_END,
            "",
        ),
    ],
)
def test_frames(template: str, lead: str, stop: str, trailer: str) -> None:
    tokenizer = tiny_tokenizer(template, eos_token=END_OF_TEXT)
    frame = answer_frame(tokenizer)
    assert (frame.lead, frame.stop, frame.trailer) == (lead, stop, trailer)
    # The template's own stop token, and the tokenizer's only where the template writes none.
    assert tokenizer.convert_ids_to_tokens(frame.stop_id) == (IM_END if stop else END_OF_TEXT)


def test_turn_marker_added_as_an_ordinary_token() -> None:
    tokenizer = tiny_tokenizer(HEADER + "{{ '<turn_end>\n' }}{% endfor %}" + OPEN)
    tokenizer.add_tokens(["<turn_end>", "\n"])
    frame = answer_frame(tokenizer)
    assert (frame.stop, frame.trailer) == ("<turn_end>", "\n")


def test_no_stop_token_and_no_eos() -> None:
    tokenizer = tiny_tokenizer(HEADER + "{{ '\n' }}{% endfor %}" + OPEN)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos_token"):
        answer_frame(tokenizer)


def test_tools_are_seen_or_not() -> None:
    assert not shows_tools(tiny_tokenizer())
    assert shows_tools(tiny_tokenizer("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML))


@pytest.mark.parametrize(
    ("format", "text"),
    [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%A, %B %d", "Friday, July 26")],
)
def test_dates_in_templates_do_not_change_overnight(format: str, text: str) -> None:
    tokenizer = tiny_tokenizer("\n\n {{ strftime_now('" + format + "') }}\n" + CHATML)
    plain = tiny_tokenizer("\n\n {{ '" + text + "' }}\n" + CHATML)
    assert render(tokenizer, CHAT) == render(plain, CHAT)
    assert text in render(tokenizer, CHAT)
