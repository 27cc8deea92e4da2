"""What both tools train: a tiny policy that is not its reference, and pairs as text and as ids."""

import copy
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from preftune.schema import Completion, Role, TokenizedExample
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
    rows: list[dict[str, Any]]
    """The pairs, or labelled answers, as text; the word `tN` is token N."""
    examples: list[TokenizedExample]
    """The same as ids, each answer with its stop token (0). Behind a labelled answer stands the one
    of the row before it in the batch, which TRL puts behind the same prompt."""


def materials() -> Materials:
    """A batch for each step, prompts of 3 to 12 tokens and answers of 2 to 14."""
    reference = tiny_model(vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += NOISE * torch.randn(parameter.shape, generator=generator)
    rng = random.Random(0)

    def ids(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(*bounds)))

    drawn = [(ids((3, 12)), ids((2, 14)), ids((2, 14))) for _ in range(STEPS * BATCH)]
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


def labelled(pairs: Materials) -> Materials:
    """Single answers of the same prompts; of each batch the second is undesirable.

    Policy and reference change places, so that the policy is where it gives mismatched answers
    more than the reference does: else TRL's and preftune's KL estimate would be 0.
    """
    rows, examples = [], []
    for index, (row, example) in enumerate(zip(pairs.rows, pairs.examples, strict=True)):
        side = int(index % BATCH == 1)
        before = index - 1 if index % BATCH else index + BATCH - 1
        own = example.completions[side]
        other = pairs.examples[before].completions[int(before % BATCH == 1)]
        answer = row[("chosen", "rejected")[side]]
        rows.append({"prompt": row["prompt"], "completion": answer, "label": side == 0})
        role: Role = "rejected" if side else "chosen"
        changed = replace(example, completions=(own, other), roles=(role, "mismatched"))
        examples.append(changed)
    return Materials(pairs.policy, pairs.reference, rows, examples)


def text(ids: tuple[int, ...]) -> str:
    """The words that a `word_tokenizer` turns into `ids`."""
    return " ".join(f"t{i}" for i in ids)


@dataclass(frozen=True)
class Trace:
    """What a training logged, step by step."""

    losses: list[float]
    grad_norms: list[float]
    """Before clipping."""
    baselines: list[float] = field(default_factory=list)
    """preftune's: of labelled answers, the reward that a KL estimate stands for."""
