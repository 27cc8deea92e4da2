"""Answers side by side: generation beside one token at a time, repetition, flags."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.evaluation.generation import BATCH, answers, generating
from preftune.evaluation.samples import AskedPrompt, repetition, sample_row
from preftune.model.load import LoadedModel
from tests.examples import make_examples
from tests.tiny import tiny_model, tiny_tokenizer

STOP, PAD = 7, 0


def greedy(model, prompt: list[int], number: int, stops: set[int]) -> list[int]:
    """One prompt by itself, no padding, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + number and (len(ids) == len(prompt) or ids[-1] not in stops):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_prompts_of_all_lengths_are_answered_as_each_alone():
    model = tiny_model()
    examples = make_examples(BATCH + 3, seed=4)
    prompts = [list(example.prompt_ids) for example in examples]
    assert len({len(prompt) for prompt in prompts}) > 5
    first = Counter(greedy(model, prompt, 3, set())[2] for prompt in prompts)
    stops = {first.most_common(1)[0][0]}
    found = answers(model, prompts, 6, stops, PAD)
    assert found == [greedy(model, prompt, 6, stops) for prompt in prompts]
    assert len({len(answer) for answer in found}) > 1


def test_drawn_answers_follow_the_model():
    """The first token's frequencies over 1,600 draws, within 4 standard errors."""
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    prompt = list(make_examples(1, seed=4)[0].prompt_ids)
    torch.manual_seed(5)
    drawn = answers(model, [prompt] * 1600, 1, set(), PAD, draw=True)
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    counts = Counter(answer[0] for answer in drawn)
    top = likely.topk(8)
    assert top.values[0] < 0.9
    for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        assert abs(counts[token] / 1600 - p) < 4 * (p * (1 - p) / 1600) ** 0.5


def test_generating_leaves_everything_as_it_was():
    model = tiny_model().train()
    model.set_attn_implementation("eager")
    loaded = LoadedModel(SimpleNamespace(model=model), torch.float32, {}, "sdpa")  # type: ignore[arg-type]
    state = torch.get_rng_state()
    with generating(loaded, seed=3) as ready:
        assert not ready.training
        assert ready.config._attn_implementation == "sdpa"
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.config._attn_implementation == "eager"


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_is_the_share_of_4_grams_seen_before(ids):
    seen, again = [], 0
    for end in range(4, len(ids) + 1):
        gram = ids[end - 4 : end]
        again += gram in seen
        seen.append(gram)
    assert repetition(ids) == pytest.approx(again / len(seen) if seen else 0.0)


@pytest.mark.parametrize(
    ("ids", "flags"),
    [
        ([1, 2, 3, 4, STOP], []),
        ([1, 2, STOP], ["short"]),
        ([1, 2], ["cut"]),
        ([], ["cut"]),
        ([*range(8, 24), STOP], ["long"]),
        ([1, 2] * 6 + [STOP], ["repetitive"]),
    ],
)
def test_flags(ids, flags):
    """Beside a chosen answer of 8 tokens."""
    row = make_examples(1, seed=0)[0]
    chosen = type(row.completions[0])(tuple(range(8)))
    row = type(row)(row.row_id, row.prompt_ids, (chosen,), ("chosen",), "source", row.prompt_key)
    line = sample_row(3, AskedPrompt(row, "mine"), [STOP], ids, {STOP}, tiny_tokenizer().decode)
    assert line["flags"] == {"start": ["short"], "policy": flags}
    assert line["num_tokens"] == {"chosen": 8, "start": 1, "policy": len(ids)}
    assert (line["step"], line["dataset"], line["source"]) == (3, "mine", "source")


def test_an_answer_to_be_unlearnt_is_not_shown_as_chosen():
    row = make_examples(1, seed=0)[0]
    row = type(row)(
        row.row_id, row.prompt_ids, row.completions[:1], ("rejected",), "s", row.prompt_key
    )
    line = sample_row(1, AskedPrompt(row, "m"), [1], [2, STOP], {STOP}, tiny_tokenizer().decode)
    assert line["chosen"] is None
    assert set(line["num_tokens"]) == {"start", "policy"}
    assert line["flags"]["policy"] == []
