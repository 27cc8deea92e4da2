"""Tokenised examples without a tokenizer, for tests below the data layer."""

import random
from dataclasses import replace

from preftune.schema import Completion, TokenizedExample


def make_examples(
    n: int,
    seed: int = 0,
    *,
    vocab: int = 300,
    prompt: tuple[int, int] = (1, 40),
    completion: tuple[int, int] = (1, 60),
) -> list[TokenizedExample]:
    """Pairs of random token ids with very different lengths.

    Args:
        n: number of pairs.
        seed: of the ids.
        vocab: ids are below this.
        prompt: fewest and most tokens of a prompt.
        completion: fewest and most tokens of an answer.
    """
    rng = random.Random(seed)

    def ids(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(rng.randint(*bounds)))

    return [
        TokenizedExample(
            row_id=f"row-{i}",
            prompt_ids=ids(prompt),
            completions=(Completion(ids(completion)), Completion(ids(completion))),
            roles=("chosen", "rejected"),
            source="random",
            prompt_key=i,
        )
        for i in range(n)
    ]


def batch() -> list[TokenizedExample]:
    """Pairs of very different lengths; three prompts occur twice."""
    examples = make_examples(7, seed=3)
    return [
        *examples,
        *(
            replace(e, prompt_ids=examples[i].prompt_ids)
            for i, e in enumerate(make_examples(3, seed=4))
        ),
    ]
