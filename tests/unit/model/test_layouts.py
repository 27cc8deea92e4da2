"""Every layout gives the same numbers: log-probs and gradients, over architectures and batches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.batching.layout import Segments, Span, build_layout
from preftune.errors import ModelError
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, SequenceLogps, pair_logps
from preftune.model.layout_choice import choose_layout
from preftune.schema import Completion, TokenizedExample
from tests.examples import batch
from tests.policies import MIXTURES, PACKED, make_policy
from tests.tiny import tiny_model

WINDOWED = [name for name, (_, own) in PACKED.items() if "sliding_window" in own]
DENSE = [name for name in PACKED if name not in MIXTURES]
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {}),
    "mamba": ("Mamba", {}),
}


def run(
    policy: Any, examples: list[TokenizedExample], name: Any
) -> tuple[SequenceLogps, torch.Tensor]:
    """Log-probs, and the gradient of a sum that weighs every answer differently."""
    policy.zero_grad(set_to_none=True)
    result = pair_logps(policy, build_layout(examples, name))
    (result.sums * torch.linspace(0.5, 1.5, len(result.sums))).sum().backward()
    # Experts that no token chose have no gradient.
    gradients = [p.grad.flatten().double() for p in policy.parameters() if p.grad is not None]
    return result, torch.cat(gradients)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_equal_padded_ones(name: str) -> None:
    policy = make_policy(*PACKED[name])
    examples = batch()
    padded, padded_gradient = run(policy, examples, "concatenated")
    assert choose_layout(policy, "shared_prefix", "auto", longest=120).name == "shared_prefix"
    packed, packed_gradient = run(policy, examples, "shared_prefix")
    assert torch.allclose(packed.sums, padded.sums, atol=1e-4, rtol=1e-6)
    assert torch.equal(packed.lengths, padded.lengths)
    assert (packed_gradient - padded_gradient).norm() <= 1e-4 * padded_gradient.norm()


# transformers writes a soft-cap's softmax in fp32, so the oracle has no fp64 there.
@pytest.mark.parametrize("name", [name for name in PACKED if name != "gemma2"])
def test_packed_rows_equal_padded_ones_in_fp64(name: str) -> None:
    policy = make_policy(*PACKED[name], dtype=torch.float64)
    if name in MIXTURES:  # the grouped product of experts has no fp64
        policy.model.set_experts_implementation("eager")
    examples = batch()
    padded, padded_gradient = run(policy, examples, "concatenated")
    choose_layout(policy, "shared_prefix", "auto", longest=120)
    packed, packed_gradient = run(policy, examples, "shared_prefix")
    # deepseek_v3's router multiplies in fp32, which on some CPUs rounds otherwise for more rows.
    exact = 1e-6 if name == "deepseek_v3" else 1e-10
    assert torch.allclose(packed.sums, padded.sums, atol=exact, rtol=1e-10)
    assert (packed_gradient - padded_gradient).norm() <= 1e-6 * padded_gradient.norm()


@pytest.mark.parametrize("name", WINDOWED)
def test_the_windows_of_these_tests_bite(name: str) -> None:
    kind, settings = PACKED[name]
    narrow, wide = (
        make_policy(kind, settings),
        make_policy(kind, settings | {"sliding_window": 200}),
    )
    sums = [pair_logps(p, build_layout(batch(), "concatenated")).sums for p in (narrow, wide)]
    assert (sums[0] - sums[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", PADDED)
def test_a_model_that_does_not_follow_is_noticed(name: str) -> None:
    policy = make_policy(*PADDED[name])
    before = policy.model.config._attn_implementation
    examples = batch()
    padded = pair_logps(policy, build_layout(examples, "concatenated")).sums
    choice = choose_layout(policy, "auto", "auto", longest=120)
    assert choice.name == "concatenated"
    assert "does not follow the packed layout" in choice.why
    assert policy.model.config._attn_implementation == before
    assert torch.equal(pair_logps(policy, build_layout(examples, "concatenated")).sums, padded)
    with pytest.raises(ModelError, match="forward_layout is 'shared_prefix'"):
        choose_layout(policy, "shared_prefix", "auto", longest=120)


def test_eager_attention_means_padded_pairs() -> None:
    choice = choose_layout(make_policy("Llama", {}), "auto", "eager", longest=120)
    assert (choice.name, choice.why) == (
        "concatenated",
        "attn_implementation eager has no packed form",
    )


@pytest.mark.parametrize("wrong", ["leak", "no prompt"])
def test_wrong_segments_are_noticed_by_the_probe(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant of the layout must not pass the probe."""
    from preftune.batching import layout as module

    class Mutant(Segments):
        def __init__(self, spans: tuple[Span, ...]) -> None:
            def changed(s: Span) -> Span:
                prefix = s.prefix_start, s.start if wrong == "leak" else s.prefix_start
                return s if s.prefix_start == s.prefix_stop else Span(s.start, s.stop, *prefix)

            super().__init__(tuple(map(changed, spans)))

    monkeypatch.setattr(module, "Segments", Mutant)
    choice = choose_layout(make_policy(*PACKED["llama"]), "auto", "auto", longest=120)
    assert choice.name == "concatenated"
    assert "differ" in choice.why or "cannot be exchanged" in choice.why


# Among experts, the number of tokens that an expert gets changes the last bits of all of them.
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("side", [0, 1])
def test_a_token_of_one_answer_changes_no_bit_of_any_other(name: str, side: int) -> None:
    policy = make_policy(*PACKED[name])
    choose_layout(policy, "shared_prefix", "auto", longest=120)
    examples = batch()
    changed = examples[2]
    ids = list(changed.completions[side].ids)
    ids[len(ids) // 2] = (ids[len(ids) // 2] + 1) % 300
    completions = list(changed.completions)
    completions[side] = Completion(tuple(ids))
    others = [*examples[:2], replace(changed, completions=tuple(completions)), *examples[3:]]
    with torch.no_grad():
        before = pair_logps(policy, build_layout(examples, "shared_prefix")).sums
        after = pair_logps(policy, build_layout(others, "shared_prefix")).sums
    same = torch.arange(len(before)) != 2 * 2 + side
    assert torch.equal(before[same], after[same])
    assert before[~same] != after[~same]


lengths = st.integers(1, 12)


@st.composite
def batches(draw: st.DrawFn) -> list[TokenizedExample]:
    """Rows with k answers each, some on one prompt; prompts and answers of one token among them."""
    num_answers = draw(st.integers(1, 4))
    prompts = [
        tuple(draw(st.lists(st.integers(0, 299), min_size=1, max_size=12)))
        for _ in range(draw(st.integers(1, 4)))
    ]

    def completion() -> Completion:
        ids = tuple(draw(st.lists(st.integers(0, 299), min_size=1, max_size=12)))
        if draw(st.booleans()):
            return Completion(ids)
        scored = [draw(st.booleans()) for _ in ids]
        scored[draw(st.integers(0, len(ids) - 1))] = True
        return Completion(ids, tuple(scored))

    return [
        TokenizedExample(
            row_id=f"r{i}",
            prompt_ids=draw(st.sampled_from(prompts)),
            completions=tuple(completion() for _ in range(num_answers)),
            roles=("chosen",) * num_answers,
            source="s",
            prompt_key=0,
        )
        for i in range(draw(st.integers(1, 6)))
    ]


@settings(max_examples=60, deadline=None)
@given(examples=batches(), order=st.randoms(use_true_random=False))
def test_any_batch_in_any_order(examples: list[TokenizedExample], order: Any) -> None:
    plain, packed = tiny_model().double(), tiny_model().double()
    packed.set_attn_implementation(SEGMENTS)
    shuffled = list(range(len(examples)))
    order.shuffle(shuffled)
    k = len(examples[0].completions)
    with torch.no_grad():
        padded = pair_logps(PolicyModel(plain), build_layout(examples, "concatenated"))
        layout = build_layout([examples[i] for i in shuffled], "shared_prefix")
        moved = pair_logps(PolicyModel(packed), layout)
    where = torch.tensor([i * k + side for i in shuffled for side in range(k)])
    assert torch.allclose(moved.sums, padded.sums[where], atol=1e-9, rtol=1e-9)
    assert torch.equal(moved.lengths, padded.lengths[where])
    # Every prompt once, every answer once, nothing else.
    answers = sum(len(c.ids) for e in examples for c in e.completions)
    assert layout.num_tokens == answers + sum(map(len, {e.prompt_ids for e in examples}))


def test_packed_rows_under_activation_checkpointing() -> None:
    policy = make_policy(*PACKED["mistral"])
    choose_layout(policy, "shared_prefix", "auto", longest=120)
    plain = run(policy, batch(), "shared_prefix")
    policy.train()
    policy.model.activation_checkpointing_enable({"use_reentrant": False})
    again = run(policy, batch(), "shared_prefix")
    assert torch.equal(again[0].sums, plain[0].sums)
    assert (again[1] - plain[1]).norm() <= 1e-6 * plain[1].norm()


def test_the_packed_row_that_the_docstrings_show() -> None:
    pair = TokenizedExample(
        "r", (5, 6), (Completion((7, 8)), Completion((9,))), ("chosen", "rejected"), "s", 0
    )
    (block,) = build_layout([pair], "shared_prefix").blocks
    assert block.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert block.position_ids is not None
    assert block.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert block.segments == Segments((Span(0, 4, 0, 0), Span(4, 5, 0, 2)))
    assert block.score_positions.tolist() == [1, 2, 1]
    assert block.labels.tolist() == [7, 8, 9]
