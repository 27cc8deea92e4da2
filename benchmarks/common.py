"""What the benchmarks share: a model of SmolLM2-135M's shape, pairs of random tokens, processes.

Speed and memory do not depend on the values.
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preftune.model.forward import PolicyModel
from preftune.schema import Completion, TokenizedExample

VOCABULARY = 49152


def in_processes(number: int, threads: int, *words: str) -> Any:
    """The JSON that the first of several processes on the CPU prints last.

    Args:
        number: of processes.
        threads: of each.
        words: the file that they run, and its words.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = subprocess.run(
        [*command, "--nproc_per_node", str(number), *words],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


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
