"""What both tools train: a tiny policy that is not its reference, and pairs as text and as ids."""

import copy
import random
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM

from preftune.schema import Completion, TokenizedExample
from tests.peers.cases import BATCH
from tests.tiny import tiny_model

STEPS = 20
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
VOCABULARY = 300
NOISE = 0.05


@dataclass(frozen=True)
class Materials:
    """What a training starts from; both sides work on copies of the models."""

    reference: LlamaForCausalLM
    policy: LlamaForCausalLM
    """Perturbed: where it equals the reference, losses do not say what was scored."""
    rows: list[dict[str, str]]
    """The pairs as text; the word `tN` is token N."""
    examples: list[TokenizedExample]
    """The same pairs as ids, each answer with its stop token (0)."""


def materials(prompt: tuple[int, int]) -> Materials:
    """A batch for each step, answers of 2 to 14 tokens.

    Args:
        prompt: fewest and most tokens of a prompt.
    """
    reference = tiny_model(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    rng = random.Random(0)

    def ids(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(*bounds)))

    drawn = [(ids(prompt), ids((2, 14)), ids((2, 14))) for _ in range(STEPS * BATCH)]
    return Materials(
        reference,
        policy,
        [
            {"prompt": text(asked), "chosen": f" {text(chosen)}", "rejected": f" {text(rejected)}"}
            for asked, chosen, rejected in drawn
        ],
        [
            TokenizedExample(
                row_id=f"row-{i}",
                prompt_ids=asked,
                completions=(Completion((*chosen, 0)), Completion((*rejected, 0))),
                roles=("chosen", "rejected"),
                source="random",
                prompt_key=i,
            )
            for i, (asked, chosen, rejected) in enumerate(drawn)
        ],
    )


def text(ids: tuple[int, ...]) -> str:
    """The words that a `word_tokenizer` turns into `ids`."""
    return " ".join(f"t{i}" for i in ids)


@dataclass(frozen=True)
class Trace:
    """What a training logged, step by step."""

    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""
