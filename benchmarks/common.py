"""What the benchmarks share: a random model of SmolLM2-135M's shape and pairs of random tokens.

Speed and memory do not depend on the values.
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.model.forward import PolicyModel
from preftune.schema import Completion, TokenizedExample

VOCABULARY = 49152


def make_model(layers: int) -> PolicyModel:
    """A random Llama of SmolLM2-135M's width; that has 30 layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return PolicyModel(LlamaForCausalLM(config))


def make_examples(
    pairs: int, prompt: int, chosen: int, rejected: int, *, spread: float = 0.0
) -> list[TokenizedExample]:
    """Pairs of random tokens; lengths are log-normal around the given medians, or just these."""

    def ids(median: int) -> tuple[int, ...]:
        length = max(1, round(median * math.exp(spread * torch.randn(()).item())))
        return tuple(torch.randint(VOCABULARY, (length,)).tolist())

    return [
        TokenizedExample(
            f"row-{i}",
            ids(prompt),
            (Completion(ids(chosen)), Completion(ids(rejected))),
            ("chosen", "rejected"),
            "random",
            i,
        )
        for i in range(pairs)
    ]
