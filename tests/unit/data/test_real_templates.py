"""Chat templates of published models, crossed with the answers that break careless boundaries.

Each template is written out in `chat_templates/` and comes with a tiny tokenizer that has its
special tokens and the family's way with spaces. What is expected is written here by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from preftune.data.formats import parse_row
from preftune.data.proofs import Proofs, Prover
from preftune.data.reasons import Dropped, DropReason
from preftune.data.tokenize import PairTokenizer
from preftune.schema import Example, TokenizedExample
from tests.tiny import SENTENCES, chat_row

FOLDER = Path(__file__).parent / "chat_templates"
QUESTION = "What is the capital of France?"
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def as_it_is(answer: str) -> str:
    return answer


def trimmed(answer: str) -> str:
    return answer.strip()


@dataclass(frozen=True)
class Model:
    """A published model's template, and what its tokenizer and its training text look like."""

    name: str
    vocabulary: str
    """`bytes` (GPT-2, Llama 3, Qwen), `metaspace` (Llama 2, Mistral) or `spaces` (Gemma)."""
    eos: str
    stop: str
    """What the template writes behind an answer, through the stop token."""
    prompt: str
    """The rendering of `QUESTION` through the header of the answer."""
    bos: str | None = None
    adds_bos: bool = False
    markers: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """Added tokens that are not special, such as `<think>`."""
    strips_right: bool = False
    """The markers swallow the blanks behind them."""
    written: Callable[[str], str] = as_it_is
    """What is trained on where the data has this answer."""
    system: str | DropReason = ""
    """The prompt with a system message S, or what such rows are dropped for."""
    shows_tools: bool = False

    def __str__(self) -> str:
        return self.name


def chatml(*turns: tuple[str, str]) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def llama3(system: str) -> str:
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    about = f"Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}"
    return (
        "<|begin_of_text|>"
        + head.format("system")
        + f"{about}<|eot_id|>"
        + head.format("user")
        + f"{QUESTION}<|eot_id|>"
        + head.format("assistant")
    )


THINK = "<think>\n\n</think>\n\n"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TURNS = ("<|im_start|>", "<|endoftext|>")
GEMMA = f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n"

MODELS = [
    Model(
        "llama31",
        "bytes",
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|eot_id|>",
        stop="<|eot_id|>",
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        written=trimmed,
        prompt=llama3(""),
        system=llama3("S"),
        shows_tools=True,
    ),
    Model(
        "qwen25",
        "bytes",
        eos="<|im_end|>",
        stop="<|im_end|>",
        markers=TURNS,
        words=("<tool_call>", "</tool_call>"),
        prompt=chatml(("system", QWEN), ("user", QUESTION)),
        system=chatml(("system", "S"), ("user", QUESTION)),
        shows_tools=True,
    ),
    Model(
        "qwen3",
        "bytes",
        eos="<|im_end|>",
        stop="<|im_end|>",
        markers=TURNS,
        words=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        written=lambda answer: answer.lstrip("\n"),
        prompt=chatml(("user", QUESTION)) + THINK,
        system=chatml(("system", "S"), ("user", QUESTION)) + THINK,
        shows_tools=True,
    ),
    Model(
        "smollm2",
        "bytes",
        bos="<|im_start|>",
        eos="<|im_end|>",
        stop="<|im_end|>",
        markers=TURNS,
        prompt=chatml(("system", SMOLLM), ("user", QUESTION)),
        system=chatml(("system", "S"), ("user", QUESTION)),
    ),
    Model(
        "gemma2",
        "spaces",
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        stop="<end_of_turn>",
        markers=("<start_of_turn>",),
        written=trimmed,
        prompt=GEMMA,
        system=DropReason.TEMPLATE_REFUSED,
    ),
    Model(
        "gemma3",
        "spaces",
        bos="<bos>",
        adds_bos=True,
        eos="<eos>",
        stop="<end_of_turn>",
        markers=("<start_of_turn>",),
        written=trimmed,
        prompt=GEMMA,
        system=GEMMA.replace(QUESTION, f"S\n\n{QUESTION}"),
    ),
    Model(
        "mistral_v03",
        "metaspace",
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        stop="</s>",
        markers=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        written=lambda answer: " " + answer.strip(),
        prompt=f"<s>[INST] {QUESTION}[/INST]",
        # It writes the system message only as long as nobody has answered.
        system=DropReason.NOT_A_PREFIX,
        shows_tools=True,
    ),
    Model(
        "llama2",
        "metaspace",
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        stop=" </s>",
        written=lambda answer: f" {answer.strip()}",
        prompt=f"<s>[INST] {QUESTION} [/INST]",
        system=f"<s>[INST] <<SYS>>\nS\n<</SYS>>\n\n{QUESTION} [/INST]",
    ),
    Model(
        "zephyr",
        "metaspace",
        bos="<s>",
        adds_bos=True,
        eos="</s>",
        stop="</s>",
        # The template leaves the BOS to the tokenizer, which puts a space behind it.
        prompt=f"<s> <|user|>\n{QUESTION}</s>\n<|assistant|>\n",
        system=f"<s> <|system|>\nS</s>\n<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
    ),
    Model(
        "phi3",
        "bytes",
        bos="<s>",
        eos="<|endoftext|>",
        stop="<|end|>",
        markers=("<|user|>", "<|assistant|>", "<|system|>"),
        strips_right=True,
        written=lambda answer: answer.lstrip(),
        prompt=f"<|user|>{QUESTION}<|end|><|assistant|>",
        system=f"<|system|>S<|end|><|user|>{QUESTION}<|end|><|assistant|>",
    ),
    Model(
        "tulu3",
        "bytes",
        bos="<|begin_of_text|>",
        adds_bos=True,
        eos="<|end_of_text|>",
        stop="<|end_of_text|>",
        prompt=f"<|begin_of_text|><|user|>\n{QUESTION}\n<|assistant|>\n",
        system=f"<|begin_of_text|><|system|>\nS\n<|user|>\n{QUESTION}\n<|assistant|>\n",
    ),
    Model(
        "olmo2",
        "bytes",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        stop="<|endoftext|>",
        prompt=f"<|endoftext|><|user|>\n{QUESTION}\n<|assistant|>\n",
        system=f"<|endoftext|><|system|>\nS\n<|user|>\n{QUESTION}\n<|assistant|>\n",
    ),
]
BY_NAME = {model.name: model for model in MODELS}
each_model = pytest.mark.parametrize("model", MODELS, ids=str)


# ---- tokenizers


@cache
def _bpe(vocabulary: str) -> str:
    """Train a tokenizer of a family on a few sentences, as JSON, merging runs of blanks."""
    tokenizer = Tokenizer(models.BPE())
    first: list[str] = []
    corpus = [*SENTENCES] * 3 + ["a\n\nb\n\n\nc  d   e\n f"] * 8
    if vocabulary == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = []
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 450,
        min_frequency=2,
        special_tokens=first,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    whole = json.loads(tokenizer.to_str())
    whole["added_tokens"] = []
    if vocabulary == "bytes":
        _merge(whole["model"], ("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ċ", "Ġ"))
    else:
        whole["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
        _merge(whole["model"], ("\n", "\n"), ("▁", "▁"), ("\n", "▁"))
    return json.dumps(whole)


def _merge(model: dict[str, Any], *merges: tuple[str, str]) -> None:
    for a, b in merges:
        model["vocab"].setdefault(a + b, len(model["vocab"]))
        model["merges"].append([a, b])


def _set_spaces(backend: Tokenizer, vocabulary: str) -> None:
    """Give a SentencePiece-like tokenizer its family's way with spaces."""
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    if vocabulary == "spaces":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(parts)


@cache
def tokenizer_of(model: Model) -> Any:
    backend = Tokenizer.from_str(_bpe(model.vocabulary))
    _set_spaces(backend, model.vocabulary)
    named = [t for t in (model.bos, model.eos, model.stop.strip(), *model.markers) if t]
    turns = [
        AddedToken(token, special=True, normalized=False, rstrip=model.strips_right)
        for token in dict.fromkeys(named)
    ]
    backend.add_special_tokens(turns)
    backend.add_tokens([AddedToken(word, normalized=False) for word in model.words])
    if model.adds_bos and model.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{model.bos} $A",
            special_tokens=[(model.bos, backend.token_to_id(model.bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=model.bos, eos_token=model.eos
    )
    tokenizer.chat_template = (FOLDER / f"{model.name}.jinja").read_text("utf-8")
    return tokenizer


# ---- rows


@cache
def pair_tokenizer(model: Model) -> PairTokenizer:
    return PairTokenizer(tokenizer_of(model))


def example_of(raw: dict[str, Any]) -> Example:
    example = parse_row("f:1", raw, dataset="set", column_map={})
    assert isinstance(example, Example)
    return example


def run(model: Model, raw: dict[str, Any]) -> TokenizedExample | Dropped:
    return pair_tokenizer(model)([example_of(raw)])[0]


def kept(model: Model, raw: dict[str, Any]) -> TokenizedExample:
    result = run(model, raw)
    assert isinstance(result, TokenizedExample), result
    return result


def prove(model: Model, raw: dict[str, Any]) -> Proofs:
    return Prover(tokenizer_of(model))(example_of(raw), kept(model, raw))


def decode(model: Model, ids: Any) -> str:
    return tokenizer_of(model).decode(list(ids), clean_up_tokenization_spaces=False)


def trained(model: Model, row: TokenizedExample, k: int) -> str:
    """What the loss reads of answer k, which is one turn, in its place behind the prompt."""
    assert row.completions[k].scored is None
    whole, prompt = row.prompt_ids + row.completions[k].ids, decode(model, row.prompt_ids)
    text = decode(model, whole)
    assert text.startswith(prompt)
    return text[len(prompt) :]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


ANSWERS = [
    "A",
    "a",
    "user",
    "model",
    "assistant\n",
    "Paris.\n",
    "Paris. ",
    "  Paris.",
    " Paris.",
    "\nParis.",
    "\n\nParis.\n\n",
    "\n \tParis.",
    "🙂👩‍👩‍👧",
    "巴黎是法国的首都。",
    "<|im_start",
    "You are a helpful assistant",
    QUESTION,
    "preftune's probe answer",
]


@each_model
@pytest.mark.parametrize("answer", ANSWERS)
def test_trained_tokens_are_the_answer_and_its_stop_once(model: Model, answer: str) -> None:
    raw = chat_row(QUESTION, answer, "No way.")
    row = kept(model, raw)
    stop_id = tokenizer_of(model).convert_tokens_to_ids(model.stop.strip())
    assert decode(model, row.prompt_ids) == model.prompt
    for k, content in enumerate((answer, "No way.")):
        assert trained(model, row, k) == model.written(content) + model.stop
        assert row.completions[k].ids[-1] == stop_id
        assert row.completions[k].ids.count(stop_id) == 1
    # A blank that the template writes in front is its own, and no change of the answer.
    unchanged = model.written(answer).removeprefix(model.written("x")[:-1]) == answer
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=unchanged)


@each_model
@pytest.mark.parametrize("answer", ["", " ", "\n", "\t\n "])
def test_blank_answers_are_refused(model: Model, answer: str) -> None:
    for raw in (chat_row(QUESTION, "yes", answer), chat_row(QUESTION, answer, "no")):
        result = run(model, raw)
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.EMPTY_COMPLETION


@each_model
@pytest.mark.parametrize("answer", ["{}", "Par{}is", "{}Paris", "Paris{}", "Paris{} "])
def test_the_stop_string_inside_an_answer_is_refused(model: Model, answer: str) -> None:
    result = run(model, chat_row(QUESTION, answer.format(model.stop.strip()), "no"))
    assert isinstance(result, Dropped)
    empty = DropReason.EMPTY_COMPLETION if answer == "{}" else DropReason.STOP_TOKEN_INSIDE
    assert result.reason in (DropReason.STOP_TOKEN_INSIDE, empty)


@each_model
def test_system_messages_are_written_or_refused_by_row(model: Model) -> None:
    raw = chat_row(QUESTION, "yes", "no")
    raw["prompt"].insert(0, {"role": "system", "content": "S"})
    result = run(model, raw)
    if isinstance(model.system, DropReason):
        assert isinstance(result, Dropped)
        assert result.reason is model.system
    else:
        assert isinstance(result, TokenizedExample)
        assert decode(model, result.prompt_ids) == model.system
        assert prove(model, raw) == Proofs(True, True, True, True, True)


@each_model
def test_earlier_turns_belong_to_the_prompt(model: Model) -> None:
    raw = chat_row("", "yes", "\n\nno")
    raw["prompt"] = [user("hello"), assistant("good day"), user(QUESTION)]
    row = kept(model, raw)
    text = decode(model, row.prompt_ids)
    assert text.index("hello") < text.index("good day") < text.index(QUESTION)
    assert trained(model, row, 0) == model.written("yes") + model.stop
    assert trained(model, row, 1) == model.written("\n\nno") + model.stop
    proofs = prove(model, raw)
    assert (proofs.prefix, proofs.bos, proofs.stop, proofs.round_trip) == (True,) * 4


@each_model
def test_many_turn_answers_score_the_assistants_turns_or_are_refused(model: Model) -> None:
    raw = chat_row(QUESTION, "", "no")
    raw["chosen"] = [assistant("Paris."), user("and of Italy?"), assistant("Rome.")]
    result = run(model, raw)
    if model.name == "qwen3":  # it takes the think block out of turns that are not the last
        assert isinstance(result, Dropped)
        assert result.reason is DropReason.NOT_A_PREFIX
        return
    assert isinstance(result, TokenizedExample)
    many = result.completions[0]
    assert many.scored is not None
    scored = [i for i, s in zip(many.ids, many.scored, strict=True) if s]
    expected = "".join(model.written(turn) + model.stop for turn in ("Paris.", "Rome."))
    assert decode(model, scored) == expected.removeprefix(
        " " if model.vocabulary == "metaspace" else ""
    )
    assert prove(model, raw) == Proofs(True, True, True, True, True)


@pytest.mark.parametrize("model", [m for m in MODELS if m.shows_tools], ids=str)
def test_tools_are_in_the_prompt(model: Model) -> None:
    raw = chat_row(QUESTION, "yes", "no", tools=[TOOL])
    row = kept(model, raw)
    assert "look_up" in decode(model, row.prompt_ids)
    assert trained(model, row, 0) == model.written("yes") + model.stop
    assert prove(model, raw) == Proofs(True, True, True, True, True)


@pytest.mark.parametrize("model", [m for m in MODELS if m.shows_tools], ids=str)
def test_an_answer_that_calls_a_tool_is_trained_on(model: Model) -> None:
    call = {"name": "look_up", "arguments": {"place": "France"}}
    raw = chat_row(QUESTION, "", "no", tools=[TOOL])
    raw["chosen"][0]["tool_calls"] = [{"id": "123456789", "type": "function", "function": call}]
    row = kept(model, raw)
    assert "look_up" in trained(model, row, 0)
    assert '"place": "France"' in trained(model, row, 0)
    assert trained(model, row, 0).endswith(model.stop)
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=False)


# ---- thinking


def test_thoughts_in_answers_are_trained_on_and_an_empty_block_is_not() -> None:
    model = BY_NAME["qwen3"]
    thought = "<think>\nFrance, so\n</think>\n\nParis."
    row = kept(model, chat_row(QUESTION, thought, "<think>\nHm\n</think>\n\nRome."))
    assert decode(model, row.prompt_ids) == chatml(("user", QUESTION))
    assert trained(model, row, 0) == f"{thought}<|im_end|>"


def test_one_answer_with_thoughts_leaves_the_empty_block_to_the_other() -> None:
    # Both share one prompt, and the model itself would have to write the block to answer so.
    model = BY_NAME["qwen3"]
    raw = chat_row(QUESTION, "<think>\nFrance, so\n</think>\n\nParis.", "Rome.")
    row = kept(model, raw)
    assert decode(model, row.prompt_ids) == chatml(("user", QUESTION))
    assert trained(model, row, 1) == f"{THINK}Rome.<|im_end|>"
    assert prove(model, raw) == Proofs(True, True, True, True, verbatim=False)


def test_thoughts_of_earlier_turns_are_stripped_from_the_prompt_alike() -> None:
    model = BY_NAME["qwen3"]
    raw = chat_row("", "yes", "no")
    raw["prompt"] = [user("q"), assistant("<think>\nwhy\n</think>\n\nr"), user("s")]
    row = kept(model, raw)
    assert decode(model, row.prompt_ids) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>\n"
        f"<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\n{THINK}"
    )


DEEPSEEK = Model(
    "deepseek_r1",
    "bytes",
    bos="<｜begin▁of▁sentence｜>",
    adds_bos=True,
    eos="<｜end▁of▁sentence｜>",
    stop="<｜end▁of▁sentence｜>",
    markers=("<｜User｜>", "<｜Assistant｜>"),
    words=("<think>", "</think>"),
    prompt="",
)


@pytest.mark.parametrize("answer", ["Paris.", "<think>\nFrance, so\n</think>\n\nParis."])
def test_a_prompt_that_opens_a_thought_which_answers_do_not_have_is_refused(answer: str) -> None:
    # The template asks for `<think>` and takes thoughts out of every answer that it is given.
    result = run(DEEPSEEK, chat_row(QUESTION, answer, "Rome."))
    assert isinstance(result, Dropped)
    assert result.reason is DropReason.NOT_A_PREFIX
    assert "<think>" in result.detail


# ---- any text

TEXT = st.text(
    st.sampled_from("aA 1.\n\t?Pé✓🙂▁<|>") | st.characters(codec="utf-8"), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["llama31", "qwen25", "qwen3", "smollm2", "tulu3", "gemma3"]),
    prompt=TEXT,
    chosen=TEXT,
    rejected=TEXT,
)
def test_any_text(name: str, prompt: str, chosen: str, rejected: str) -> None:
    model = BY_NAME[name]
    raw = chat_row(prompt, chosen, rejected)
    result = run(model, raw)
    if isinstance(result, Dropped):
        blank = not (chosen.strip() and rejected.strip())
        equal = model.written(chosen) == model.written(rejected)
        assert result.reason is DropReason.EMPTY_COMPLETION or equal
        assert blank or equal
        return
    lossless = model.vocabulary == "bytes" or not any("▁" in t for t in (prompt, chosen, rejected))
    for k, content in enumerate((chosen, rejected)):
        if lossless:
            assert trained(model, result, k) == model.written(content) + model.stop
    proofs = prove(model, raw)
    assert (proofs.prefix, proofs.bos, proofs.stop, proofs.round_trip) == (True,) * 4
    if lossless:
        assert proofs.verbatim == all(model.written(c) == c for c in (chosen, rejected))
