"""Chat templates of published models, each with a tiny tokenizer that goes with it.

The templates are written out in `chat_templates/`; a tokenizer has its model's special tokens and
its family's way with spaces. What is expected of a model is written here by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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

from preftune.data.reasons import DropReason
from tests.tiny import SENTENCES

FOLDER = Path(__file__).parent / "chat_templates"
QUESTION = "What is the capital of France?"


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
BY_NAME = {model.name: model for model in MODELS}


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
