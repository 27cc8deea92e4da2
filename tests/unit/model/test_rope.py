"""RoPE whose frequencies depend on the longest sequence of a call: neighbours change no answer.

The oracle is each sequence alone, through a model of its own that has seen nothing before.
"""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from preftune.batching.layout import Layout, LengthLimits, build_layout
from preftune.model import forward, layout_probe
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import choose_layout
from preftune.model.rope import length_limits, longest_sequence
from preftune.schema import Completion, TokenizedExample
from tests.policies import long_rope

LIMIT = 24
LAYOUTS = ("shared_prefix", "concatenated", "separate")
SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
THETA = {"rope_theta": 10000.0}
LONG_ROPE = long_rope(LIMIT)
DYNAMIC = THETA | {"rope_type": "dynamic", "factor": 4.0}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LIMIT}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": LIMIT,
}
BY_LAYER = {"sliding_attention": THETA | {"rope_type": "default"}, "full_attention": DYNAMIC}
SWITCH, START = LengthLimits(switches=(LIMIT,)), LengthLimits(start=LIMIT)
KINDS: dict[str, tuple[str, dict[str, Any], LengthLimits]] = {
    "llama-default": ("Llama", {}, LengthLimits()),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}, LengthLimits()),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}, LengthLimits()),
    "llama-longrope": ("Llama", {"rope_parameters": LONG_ROPE}, SWITCH),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": LIMIT},
        SWITCH,
    ),
    "llama-dynamic": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT},
        START,
    ),
    "gemma3-dynamic-in-some-layers": (
        "Gemma3Text",
        {
            "rope_parameters": BY_LAYER,
            "max_position_embeddings": LIMIT,
            "layer_types": list(BY_LAYER),
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
        },
        START,
    ),
}
DEPENDENT = [name for name, (_, _, limits) in KINDS.items() if limits != LengthLimits()]


def fresh_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, overrides, _ = KINDS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**(SMALL | overrides))
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def row(prompt: int, answers: tuple[int, ...], seed: int = 0) -> TokenizedExample:
    """A row of random tokens with these lengths; a prompt is the same for the same length."""
    tokens = torch.Generator().manual_seed(seed)

    def ids(length: int, generator: torch.Generator) -> tuple[int, ...]:
        return tuple(torch.randint(3, 60, (length,), generator=generator).tolist())

    return TokenizedExample(
        f"{prompt}-{answers}-{seed}",
        ids(prompt, torch.Generator().manual_seed(prompt)),
        tuple(Completion(ids(length, tokens)) for length in answers),
        ("chosen",) * len(answers),
        "random",
        prompt,
    )


def around_the_limit() -> list[TokenizedExample]:
    """Short pairs beside long ones, answers on both sides of the limit, and exactly at it."""
    lengths = [(5, 3, 4), (20, 2, 30), (40, 6, 1), (20, 4, 5), (1, 23, 24), (1, 1, 60), (20, 31, 3)]
    return [row(prompt, (a, b), seed) for seed, (prompt, a, b) in enumerate(lengths)]


def alone(
    name: str, examples: list[TokenizedExample], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of the sum that `run` takes, by plain transformers."""
    sequences = [(e.prompt_ids, c.ids) for e in examples for c in e.completions]
    weights = torch.linspace(0.5, 1.5, len(sequences))
    sums, gradient = [], torch.zeros(())
    for weight, (prompt, answer) in zip(weights, sequences, strict=True):
        model = fresh_model(name, dtype)
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        total = -cross_entropy(logits, torch.tensor(answer), reduction="none").double().sum()
        (weight * total).backward()
        sums.append(total.detach())
        gradient = gradient + flat_gradient(model)
    return torch.stack(sums), gradient


def run(
    policy: PolicyModel, examples: list[TokenizedExample], layout: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    sums = pair_logps(policy, build_layout(examples, layout)).sums
    (sums * torch.linspace(0.5, 1.5, len(sums))).sum().backward()
    return sums.detach(), flat_gradient(policy)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", KINDS)
def test_the_limits_are_read_from_the_config(name: str) -> None:
    config = fresh_model(name).config
    assert length_limits(config) == KINDS[name][2]
    # Dynamic NTK goes on past the positions that its config names.
    assert longest_sequence(config) == 96


def test_a_model_without_rope_has_no_limits() -> None:
    assert length_limits(transformers.GPT2Config()) == LengthLimits()
    assert longest_sequence(transformers.GPT2Config()) == 1024
    assert longest_sequence(transformers.MambaConfig()) is None


@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_neighbours_change_no_answer(name: str, wanted: Any) -> None:
    examples = around_the_limit()
    expected, expected_gradient = alone(name, examples)
    policy = PolicyModel(fresh_model(name))
    assert choose_layout(policy, wanted, "auto", longest=61).name == wanted
    sums, gradient = run(policy, examples, Layout(wanted, policy.limits))
    assert torch.allclose(sums, expected, atol=1e-4, rtol=1e-6)
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("name", DEPENDENT)
def test_neighbours_change_no_answer_in_fp64(name: str, wanted: Any) -> None:
    examples = around_the_limit()
    expected, expected_gradient = alone(name, examples, torch.float64)
    policy = PolicyModel(fresh_model(name, torch.float64))
    choose_layout(policy, wanted, "auto", longest=61)
    sums, gradient = run(policy, examples, Layout(wanted, policy.limits))
    assert torch.allclose(sums, expected, atol=1e-10, rtol=1e-10)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("name", DEPENDENT)
def test_without_limits_neighbours_would_change_answers(name: str, wanted: Any) -> None:
    """The mutant that the tests above must notice."""
    examples = around_the_limit()
    expected, expected_gradient = alone(name, examples)
    policy = PolicyModel(fresh_model(name))
    choose_layout(policy, wanted, "auto", longest=61)
    sums, gradient = run(policy, examples, wanted)
    assert (sums - expected).abs().max() > 0.1
    assert (gradient - expected_gradient).norm() > 1e-2 * expected_gradient.norm()


@pytest.mark.parametrize("mutant", [False, True])
@pytest.mark.parametrize("name", DEPENDENT)
def test_earlier_calls_change_no_bit(
    name: str, mutant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the limit itself and between it and the longest yet, where transformers keeps state.

    The mutant is transformers alone, which only longrope survives.
    """
    if mutant:
        monkeypatch.setattr(forward, "forget_earlier_calls", lambda model: None)
    policy = PolicyModel(fresh_model(name))
    layout = Layout("concatenated", KINDS[name][2])

    def sums(answer: int) -> torch.Tensor:
        return pair_logps(policy, build_layout([row(4, (answer,))], layout)).sums

    with torch.no_grad():
        lengths = (3, LIMIT - 4, LIMIT - 3, 30)
        before = [sums(length) for length in lengths]
        sums(80)
        after = [sums(length) for length in lengths]
        again = [sums(length) for length in reversed(lengths)][::-1]
    same = all(map(torch.equal, before, after)) and all(map(torch.equal, before, again))
    assert same == (not mutant or "dynamic" not in name)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, PolicyModel]]:
    """Of each kind one for packed rows, and one that runs a sequence at a time."""
    made = {}
    for name in DEPENDENT:
        packed = fresh_model(name, torch.float64)
        packed.set_attn_implementation(SEGMENTS)
        made[name] = (PolicyModel(packed), PolicyModel(fresh_model(name, torch.float64)))
    return made


lengths = st.one_of(st.integers(1, 12), st.integers(LIMIT - 3, LIMIT + 3))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(DEPENDENT),
    rows=st.integers(1, 3).flatmap(
        lambda k: st.lists(st.tuples(lengths, st.tuples(*[lengths] * k)), min_size=1, max_size=5)
    ),
    order=st.randoms(use_true_random=False),
)
def test_any_batch_around_the_limit_in_any_order(
    models: Any, name: str, rows: Any, order: Any
) -> None:
    packed, plain = models[name]
    examples = [row(prompt, answers, seed) for seed, (prompt, answers) in enumerate(rows)]
    shuffled = list(range(len(examples)))
    order.shuffle(shuffled)
    moved = [examples[i] for i in shuffled]
    sequences = [
        TokenizedExample(e.row_id, e.prompt_ids, (c,), ("chosen",), e.source, e.prompt_key)
        for e in moved
        for c in e.completions
    ]
    layout = build_layout(moved, Layout("shared_prefix", KINDS[name][2]))
    with torch.no_grad():
        sums = pair_logps(packed, layout).sums
        each = [pair_logps(plain, build_layout([s], "concatenated")).sums for s in sequences]
    assert torch.allclose(sums, torch.cat(each), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("longest", [LIMIT, LIMIT + 1])
@pytest.mark.parametrize("name", DEPENDENT)
def test_the_probe_crosses_the_limit_where_rows_do(
    name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    kept = layout_probe.build_layout

    def watched(examples: Any, layout: Any) -> Any:
        seen.append([length for example in examples for length in example.lengths])
        return kept(examples, layout)

    monkeypatch.setattr(layout_probe, "build_layout", watched)
    choose_layout(PolicyModel(fresh_model(name)), "auto", "auto", longest)
    for lengths in seen:
        shared = [length for length in lengths if length > 8]
        assert (max(shared) > LIMIT) == (longest > LIMIT)
        assert min(shared) <= LIMIT
    assert len(seen) == 2
