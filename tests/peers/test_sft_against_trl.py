"""Stage sft against TRL's SFTTrainer: 20 steps, the same loss and gradient norm at each.

Rows of one turn to three, whose tokens count the same over the step on both sides: a step is two
micro-batches of two rows.
"""

import copy
import random
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from preftune.config.dpo import DPOConfig
from preftune.schema import Completion, TokenizedExample
from tests.peers import preftune_side
from tests.peers.materials import VOCABULARY, Materials, Trace, materials
from tests.peers.test_losses_against_trl import differences, largest

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install '.[peers]'"),
]


@pytest.fixture(scope="module")
def start() -> Materials:
    """Conversations: behind the first answer of a pair comes the other, after masked tokens."""
    rng, pairs = random.Random(1), materials()
    examples = []
    for index, example in enumerate(pairs.examples):
        first, second = (completion.ids for completion in example.completions)
        ids, scored = first, [True] * len(first)
        for _ in range(index % 3):
            asked = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 9)))
            ids, scored = ids + asked + second, scored + [False] * len(asked) + [True] * len(second)
        completion = Completion(ids, tuple(scored) if index % 3 else None)
        examples.append(replace(example, completions=(completion,), roles=("answer",)))
    return replace(pairs, examples=examples, rows=[row_of(example) for example in examples])


def row_of(example: TokenizedExample) -> dict[str, Any]:
    """A row as TRL takes one that is tokenised."""
    (completion,) = example.completions
    scored = completion.scored or (True,) * len(completion.ids)
    return {
        "input_ids": [*example.prompt_ids, *completion.ids],
        "completion_mask": [0] * len(example.prompt_ids) + list(map(int, scored)),
    }


@pytest.fixture(scope="module")
def theirs(start, tmp_path_factory) -> Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl_trained(start, tmp_path_factory.mktemp("trl"))


def trl_trained(start: Materials, folder: Path) -> Trace:
    """The same rows, in order, by TRL."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from benchmarks.side_by_side.materials import word_tokenizer
    from tests.peers.trl_side import Watch, common_arguments

    watch = Watch()
    arguments = SFTConfig(**common_arguments(folder, 2), completion_only_loss=True)
    trainer = SFTTrainer(
        model=copy.deepcopy(start.policy),
        args=arguments,
        train_dataset=Dataset.from_list(start.rows),
        processing_class=word_tokenizer(VOCABULARY),
        callbacks=[watch],
    )
    trainer.train()
    return watch.trace


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_loss_and_gradient_norm_equal_trls_at_each_step(layout, start, theirs, tmp_path):
    ours = preftune_side.train(DPOConfig(stage="sft", forward_layout=layout), start, tmp_path)
    loss, norm = (largest(getattr(ours, w), getattr(theirs, w)) for w in ("losses", "grad_norms"))
    print(f"| sft, {layout} | {loss:.1e} | {norm:.1e} |")
    assert differences(ours, theirs) == []


def test_tokens_of_the_user_that_count_are_seen(start, theirs, tmp_path):
    """Mutant: every token behind the prompt is learnt."""
    unmasked = [
        replace(e, completions=(replace(e.completions[0], scored=None),)) for e in start.examples
    ]
    mutant = replace(start, examples=unmasked)
    ours = preftune_side.train(DPOConfig(stage="sft"), mutant, tmp_path)
    assert differences(ours, theirs)
