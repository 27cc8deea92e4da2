"""Built-in chat templates, and what a template is found to write around answers."""

import json
from pathlib import Path

import pytest

from preftune.data.chat import (
    TemplateRefused,
    answer_frame,
    builtin_templates,
    render,
    set_chat_template,
    shows_tool_calls,
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
        ("plain", "System:\nS\n\nUser:\nQ\n\nAssistant:\nA<|im_end|>\n\n"),
        ("alpaca", "S\n\n### Instruction:\nQ\n\n### Response:\nA<|im_end|>\n\n"),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nS<|im_end|>"
            "<|start_header_id|>user<|end_header_id|>\n\nQ<|im_end|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|im_end|>",
        ),
    ],
)
def test_builtin_templates(name: str, text: str) -> None:
    tokenizer = tiny_tokenizer(None)
    stop, trailer = IM_END, text.rpartition(IM_END)[2]
    if name == "llama3":
        tokenizer.add_special_tokens({"eos_token": "<|eot_id|>"})
        stop, text = "<|eot_id|>", text.replace(IM_END, "<|eot_id|>")
    set_chat_template(tokenizer, name)
    assert render(tokenizer, CHAT) == text
    prompt = render(tokenizer, CHAT[:2], open_answer=True)
    assert text.startswith(prompt)
    assert text[len(prompt) :] == f"A{stop}{trailer}"
    frame = answer_frame(tokenizer)
    assert (frame.lead, frame.blank, frame.stop, frame.trailer) == ("", "", stop, trailer)
    assert frame.stop_id == tokenizer.eos_token_id


def test_names() -> None:
    assert builtin_templates() == ["alpaca", "chatml", "llama3", "plain", "tulu", "zephyr"]


def test_alpaca_opens_with_its_own_words_where_there_is_no_system_message() -> None:
    tokenizer = tiny_tokenizer(None)
    set_chat_template(tokenizer, "alpaca")
    assert render(tokenizer, CHAT[1:2], open_answer=True) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQ\n\n### Response:\n"
    )


@pytest.mark.parametrize("name", builtin_templates())
def test_builtin_templates_write_the_bos_of_tokenizers_that_add_one(name: str) -> None:
    tokenizer = tiny_tokenizer(None, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    set_chat_template(tokenizer, name)
    text = render(tokenizer, CHAT)
    assert text.count(END_OF_TEXT) == 1
    # As transformers and servers tokenise a chat, and as plain text is tokenised.
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert ids == tokenizer(text.removeprefix(END_OF_TEXT))["input_ids"]


@pytest.mark.parametrize(("name", "marker"), [("llama3", "<|eot_id|>"), ("chatml", IM_END)])
def test_a_template_whose_stop_is_no_token_of_the_tokenizer_is_refused(
    name: str, marker: str
) -> None:
    tokenizer = tiny_tokenizer(None, eos_token=END_OF_TEXT)
    text = tokenizer.backend_tokenizer.to_str().replace("im_end", "im_nd")
    tokenizer = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text), eos_token=END_OF_TEXT
    )
    with pytest.raises(ConfigError) as caught:
        set_chat_template(tokenizer, name)
    for word in (repr(name), marker, "alpaca, plain, tulu or zephyr", "eos_token"):
        assert word in str(caught.value)
    assert tokenizer.chat_template is None
    for other in ("alpaca", "plain", "tulu", "zephyr"):
        set_chat_template(tokenizer, other)


@pytest.mark.parametrize("name", [n for n in builtin_templates() if n != "chatml"])
def test_builtin_templates_refuse_roles_they_do_not_write(name: str) -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    set_chat_template(tokenizer, name)
    with pytest.raises(TemplateRefused, match=f"the {name} template has no role tool"):
        render(tokenizer, [*CHAT, {"role": "tool", "content": "x"}])


def test_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML)
    tokenizer = tiny_tokenizer(None)
    set_chat_template(tokenizer, str(path))
    assert tokenizer.chat_template == CHATML


def snapshot(cache: Path, **files: str) -> None:
    """Lay files out as the Hub's cache keeps a repository."""
    folder = cache / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for name, text in files.items():
        file = name.replace("__", ".")
        (folder / "snapshots" / ("0" * 40) / file).write_text(text, "utf-8")


NAMED = [{"name": "tool_use", "template": "never"}, {"name": "default", "template": CHATML}]


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": CHATML, "tokenizer_config__json": "{}"},
        {"tokenizer_config__json": json.dumps({"chat_template": CHATML})},
        {"tokenizer_config__json": json.dumps({"chat_template": NAMED})},
    ],
)
def test_template_of_another_tokenizer_by_folder_and_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot(tmp_path, **files)
    by_id, by_folder = tiny_tokenizer(None), tiny_tokenizer(None)
    set_chat_template(by_id, "org/name")
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    set_chat_template(by_folder, str(folder))
    assert by_id.chat_template == by_folder.chat_template == CHATML


def test_hub_id_that_cannot_be_read_or_has_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="'org/name' is no local file or folder, and reading"):
        set_chat_template(tiny_tokenizer(None), "org/name")
    snapshot(tmp_path, tokenizer_config__json='{"eos_token": "</s>"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json of 'org/name' holds no chat"):
        set_chat_template(tiny_tokenizer(None), "org/name")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "has neither chat_template.jinja nor tokenizer_config.json"),
        ("{", "holds no chat template"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', "holds no chat template"),
    ],
)
def test_folder_without_a_template(tmp_path: Path, config: str | None, said: str) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ConfigError) as caught:
        set_chat_template(tiny_tokenizer(None), str(tmp_path))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)


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
    assert frame.blank == (" " if "' ' + m" in template else "")
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


def test_calls_of_tools_are_seen_or_not() -> None:
    call = "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}"
    assert not shows_tool_calls(tiny_tokenizer())
    assert shows_tool_calls(tiny_tokenizer(CHATML.replace("{% endfor %}", call + "{% endfor %}")))
    # Refused by the template itself, so that nothing is lost in silence.
    refuses = "{% if messages[-1]['tool_calls'] %}{{ raise_exception('none') }}{% endif %}"
    assert shows_tool_calls(tiny_tokenizer(refuses + CHATML))


@pytest.mark.parametrize(
    ("format", "text"),
    [("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%A, %B %d", "Friday, July 26")],
)
def test_dates_in_templates_do_not_change_overnight(format: str, text: str) -> None:
    tokenizer = tiny_tokenizer("\n\n {{ strftime_now('" + format + "') }}\n" + CHATML)
    plain = tiny_tokenizer("\n\n {{ '" + text + "' }}\n" + CHATML)
    assert render(tokenizer, CHAT) == render(plain, CHAT)
    assert text in render(tokenizer, CHAT)
