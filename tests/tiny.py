"""Tiny tokenizers, models and pair files, made in the test: nothing is downloaded.

>>> tokenizer = tiny_tokenizer()
>>> model = tiny_model()
>>> write_jsonl(tmp_path / "train.jsonl", make_pairs(20, seed=0))
"""

import json
import random
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes a newline after the stop token, as SmolLM2's and Qwen's templates do."""

SENTENCES = (
    "What is the capital of France? The capital of France is Paris.",
    "Name a synonym for the word large. A synonym for large is big.",
    "You are a helpful assistant. Answer the question in one short sentence.",
    "The user asked a question and the assistant wrote an answer to the question.",
    "Please write an email to thank a friend who helped with the garden.",
    "I would rather not say, but if you must know, it is warm and rainy today.",
    "system user assistant tool",
    "A cat sat on the mat. The dog ran in the park; the birds sang in the trees.",
)

_WORDS = tuple(sorted({w.strip(".,;?") for s in SENTENCES for w in s.split()}))


@cache
def _trained_bpe() -> str:
    """Train a byte-level BPE of 400 tokens and return it as JSON; any text is encodable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=2,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A run of spaces becomes a token, so that texts do merge across a careless boundary.
    corpus = [*SENTENCES, *SENTENCES, *SENTENCES, *["a  b   c"] * 8]
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    chat_template: str | None = CHATML, *, bos: bool = False, eos_token: str = IM_END
) -> Any:
    """Make a byte-level BPE tokenizer of about 400 tokens; `pad == eos`, as in SmolLM2.

    The result is a `PreTrainedTokenizerFast`, typed Any: transformers' own types of what its
    methods take and give are unions that tests would have to narrow at every call.

    Args:
        chat_template: Jinja text, or None for a tokenizer without one.
        bos: put `<|endoftext|>` in front of every text, as Llama's tokenizers do.
        eos_token: `<|im_end|>`, or `<|endoftext|>` to tell it apart from the template's stop token.
    """
    backend = Tokenizer.from_str(_trained_bpe())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A",
            pair=f"{END_OF_TEXT} $A $B",
            special_tokens=[(END_OF_TEXT, backend.token_to_id(END_OF_TEXT))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT if bos else None,
        eos_token=eos_token,
        pad_token=eos_token,
        additional_special_tokens=[IM_START, IM_END, END_OF_TEXT],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Make a random 2-layer Llama (hidden 32) in fp32 on CPU, in eval mode.

    Args:
        seed: of the weights; the global generator is left as it was.
        **overrides: fields of `LlamaConfig`, such as `tie_word_embeddings=True`.
    """
    import torch

    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "dtype": torch.float32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


def tiny_mixture(*, seed: int = 0, **overrides: Any) -> Any:
    """Make a random 2-layer Mixtral of 4 experts, 2 a token, that prefers some of them.

    Args:
        seed: of the weights; the global generator is left as it was.
        **overrides: fields of `MixtralConfig`.
    """
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = tiny_model().config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")
    kept += ("num_attention_heads", "num_key_value_heads", "eos_token_id", "bos_token_id")
    mixture: dict[str, Any] = {key: settings[key] for key in kept}
    mixture |= {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512}
    mixture |= {"initializer_range": 0.2, "dtype": torch.float32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(MixtralConfig(**(mixture | overrides))).eval()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line, making folders as needed, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def make_pairs(
    n: int,
    seed: int = 0,
    *,
    prompt_words: tuple[int, int] = (1, 40),
    completion_words: tuple[int, int] = (1, 60),
    prompts: int | None = None,
    chat: bool = True,
) -> list[dict[str, Any]]:
    """Make rows of very different lengths whose two answers always differ.

    Args:
        n: number of rows.
        seed: of the words; the same seed gives the same rows.
        prompt_words: fewest and most words of a prompt.
        completion_words: fewest and most words of an answer.
        prompts: number of different prompts, taken in turn; None for one a row.
        chat: messages, or plain text.
    """
    rng = random.Random(seed)

    def words(bounds: tuple[int, int]) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(*bounds)))

    questions = [f"{i} {words(prompt_words)}?" for i in range(n if prompts is None else prompts)]
    rows = []
    for i in range(n):
        prompt = questions[i % len(questions)]
        chosen, rejected = f"Yes {words(completion_words)}.", f"No {words(completion_words)}."
        if chat:
            rows.append(chat_row(prompt, chosen, rejected))
        else:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return rows


def chat_row(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    """Make one row of one-turn messages, with further columns as given."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **columns,
    }
