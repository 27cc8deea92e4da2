"""The chunked head: the numbers of the plain one, without its logits."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from preftune.batching.layout import Block, build_layout
from preftune.model import logprob_head
from preftune.model.attention import SEGMENTS
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.logprob_head import HeadTransform, head_chunk_size, token_logps
from tests.examples import make_examples
from tests.memory import Memory, saved_sizes
from tests.tiny import tiny_model

PLAIN = HeadTransform()
TRANSFORMS = {
    "none": PLAIN,
    "scale": HeadTransform(scale=0.3),
    "softcap": HeadTransform(softcap=1.5),
    "both": HeadTransform(softcap=1.5, scale=2.0),
}
GIB = 2**30


class Subclass(nn.Linear):
    """As quantised layers and adapters are: a Linear, but not exactly."""


def make_head(
    scored: int = 13,
    hidden: int = 6,
    vocab: int = 23,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, nn.Linear, Tensor]:
    """Random hidden states, a head and labels."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(hidden, vocab, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(scored, hidden, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(vocab, (scored,), generator=generator)
    return states.requires_grad_(), head, labels


def as_plain(head: nn.Linear) -> nn.Linear:
    """A copy that takes the plain path."""
    plain = copy.deepcopy(head)
    plain.__class__ = Subclass
    return plain


def results(
    hidden: Tensor, head: nn.Linear, labels: Tensor, transform: HeadTransform, **options: Any
) -> dict[str, Tensor]:
    """Log-probs, alignments and the gradients of a loss that weighs every position otherwise."""
    hidden = hidden.detach().requires_grad_()
    head.zero_grad()
    logps, alignment = token_logps(hidden, head, labels, transform, with_alignment=True, **options)
    weights = torch.linspace(-1.0, 2.0, len(labels), dtype=logps.dtype)
    (logps * weights).sum().backward()
    assert alignment is not None
    assert not alignment.requires_grad
    assert hidden.grad is not None
    found = {"logps": logps.detach(), "alignment": alignment, "hidden": hidden.grad}
    found |= {name: p.grad for name, p in head.named_parameters() if p.grad is not None}
    return found


def distance(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_values_and_gradients_equal_the_plain_head(dtype, tolerance, transform, bias, chunk_size):
    hidden, head, labels = make_head(bias=bias, dtype=dtype)
    expected = results(hidden, as_plain(head), labels, transform)
    got = results(hidden, head, labels, transform, chunk_size=chunk_size)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype == dtype
        assert torch.allclose(got[name], value, rtol=tolerance, atol=tolerance), name


@settings(max_examples=60, deadline=None)
@given(
    scored=st.integers(0, 40),
    size=st.integers(1, 9),
    vocab=st.integers(1, 50),
    chunk_size=st.integers(1, 45),
    transform=st.sampled_from(list(TRANSFORMS.values())),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_chunks_give_the_numbers_of_one_chunk(
    scored, size, vocab, chunk_size, transform, seed
):
    hidden, head, labels = make_head(scored, size, vocab, seed=seed)
    expected = results(hidden, as_plain(head), labels, transform)
    got = results(hidden, head, labels, transform, chunk_size=chunk_size)
    for name, value in expected.items():
        assert torch.allclose(got[name], value, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradients_equal_finite_differences(transform):
    hidden, head, labels = make_head(scored=7, hidden=3, vocab=5)

    def logps(*_: Tensor) -> Tensor:
        # gradcheck writes into its inputs, which the head holds.
        return token_logps(hidden, head, labels, transform, chunk_size=3)[0]

    assert torch.autograd.gradcheck(logps, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_autocast_rounds_no_worse_than_the_plain_head(transform):
    hidden, head, labels = make_head(200, 64, 300, dtype=torch.float32)
    with torch.no_grad():
        head.weight.mul_(0.2)
    exact = results(hidden.double(), copy.deepcopy(head).double(), labels, transform)
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(hidden, as_plain(head), labels, transform)
        got = results(hidden, head, labels, transform, chunk_size=64)
    assert distance(got["logps"], exact["logps"]) > 1e-4  # it did compute in bf16
    for name, value in exact.items():
        assert got[name].dtype == torch.float32
        assert distance(got[name], value) <= 1.2 * distance(plain[name], value), name
        assert distance(got[name], value) <= 2e-2


def test_the_backward_computes_in_the_dtype_of_its_forward():
    hidden, head, labels = make_head(50, 32, 70, dtype=torch.float32)

    def gradients(forward_in_bf16: bool, backward_in_bf16: bool) -> Tensor:
        head.zero_grad()
        hidden.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=forward_in_bf16):
            logps, _ = token_logps(hidden, head, labels, PLAIN, chunk_size=16)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward_in_bf16):
            logps.sum().backward()
        assert hidden.grad is not None
        return torch.cat([p.grad.flatten() for p in (hidden, head.weight, head.bias)])

    assert torch.equal(gradients(True, False), gradients(True, True))
    assert torch.equal(gradients(False, False), gradients(False, True))
    assert not torch.equal(gradients(False, False), gradients(True, True))


def test_autocast_casts_the_weight_once_a_pass():
    hidden, head, labels = make_head(64, 8, 30, bias=False, dtype=torch.float32)
    with Memory() as memory:
        with torch.autocast("cpu", torch.bfloat16):
            logps, _ = token_logps(hidden, head, labels, PLAIN, chunk_size=4)
        assert memory.results["aten._to_copy.default", (30, 8)] == 1
        logps.sum().backward()
    assert memory.results["aten._to_copy.default", (30, 8)] == 2


def test_weight_gradients_of_many_chunks_are_summed_in_fp32():
    hidden, head, labels = make_head(512, 16, 40, dtype=torch.bfloat16)
    exact = results(hidden.double(), copy.deepcopy(head).double(), labels, PLAIN)
    got = results(hidden, head, labels, PLAIN, chunk_size=2)
    for name in ("weight", "bias"):
        assert got[name].dtype == torch.bfloat16
        # Summed in bf16, 256 chunks are off by 3e-2.
        assert distance(got[name], exact[name]) < 6e-3


def test_extreme_logits_stay_finite():
    hidden, head, labels = make_head(20, dtype=torch.float32)
    with torch.no_grad():
        hidden.mul_(1e4)
    expected = results(hidden, as_plain(head), labels, PLAIN)
    got = results(hidden, head, labels, PLAIN, chunk_size=8)
    for name, value in expected.items():
        assert value.isfinite().all()
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_costs_no_weight_gradient():
    hidden, head, labels = make_head(bias=False)
    expected = results(hidden, head, labels, PLAIN, chunk_size=5)["hidden"]
    head.weight.requires_grad_(False)
    head.weight.grad = None
    with Memory() as memory:
        got = results(hidden, head, labels, PLAIN, chunk_size=5)
    assert head.weight.grad is None
    assert torch.equal(got["hidden"], expected)
    assert not any(shape == head.weight.shape for _, shape in memory.results)


def test_a_trained_head_on_frozen_layers_gets_its_gradient():
    hidden, head, labels = make_head()
    expected = results(hidden, head, labels, PLAIN)["weight"].clone()
    head.zero_grad()
    logps, _ = token_logps(hidden.detach(), head, labels, PLAIN, chunk_size=5)
    (logps * torch.linspace(-1.0, 2.0, len(labels), dtype=logps.dtype)).sum().backward()
    assert torch.allclose(head.weight.grad, expected, rtol=1e-12)


def test_hooks_of_the_parameter_see_one_whole_gradient():
    hidden, head, labels = make_head()
    seen = []
    head.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    expected = results(hidden, head, labels, PLAIN, chunk_size=5)["weight"]
    assert len(seen) == 1
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    hidden, head, labels = make_head()

    def logps(hidden: Tensor) -> Tensor:
        return token_logps(hidden, head, labels, PLAIN, chunk_size=5)[0]

    gradients = []
    for run in (logps, lambda h: checkpoint(logps, h, use_reentrant=use_reentrant)):
        head.zero_grad()
        hidden.grad = None
        run(hidden).sum().backward()
        gradients.append((hidden.grad, head.weight.grad))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_numbers_are_the_same(mode):
    hidden, head, labels = make_head()
    expected, _ = token_logps(hidden, head, labels, PLAIN, chunk_size=5)
    with mode():
        got, _ = token_logps(hidden, head, labels, PLAIN, chunk_size=5)
    assert not got.requires_grad
    assert torch.equal(got, expected)


def test_a_head_that_does_more_than_a_product_is_called():
    hidden, head, labels = make_head()
    doubled = copy.deepcopy(head)
    with torch.no_grad():
        doubled.weight.mul_(2.0)
        doubled.bias.mul_(2.0)
    expected = token_logps(hidden, doubled, labels, PLAIN)[0]

    with_hook = copy.deepcopy(head)
    with_hook.register_forward_hook(lambda module, args, output: 2.0 * output)
    with_forward = copy.deepcopy(head)
    with_forward.forward = lambda x: 2.0 * head(x)
    wrapped = nn.Sequential(head, nn.Linear(23, 23, bias=False, dtype=torch.float64))
    with torch.no_grad():
        wrapped[1].weight.copy_(2.0 * torch.eye(23))
    for other in (with_hook, with_forward, wrapped):
        assert torch.allclose(token_logps(hidden, other, labels, PLAIN)[0], expected, rtol=1e-12)
    logits = head(hidden) * 2.0
    got = token_logps(logits, nn.Identity(), labels, PLAIN)[0]
    assert torch.allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_holds_the_logits_of_one_chunk(dtype, transform):
    vocab, size, chunk_size = 1000, 4, 32

    def peak_and_saved(scored: int) -> tuple[int, int]:
        hidden, head, labels = make_head(scored, size, vocab, dtype=dtype)

        def forward() -> Tensor:
            return token_logps(
                hidden, head, labels, transform, with_alignment=True, chunk_size=chunk_size
            )[0]

        with Memory() as memory:
            forward().sum().backward()
        assert max(shape[0] for _, shape in memory.results if shape[1:] == (vocab,)) == chunk_size
        return memory.peak, sum(saved_sizes(forward))

    peak, saved = peak_and_saved(chunk_size)
    larger_peak, larger_saved = peak_and_saved(16 * chunk_size)
    grown = 15 * chunk_size
    # Hidden states and their gradients, labels and a few numbers a position; logits would be
    # thousands of bytes a position.
    assert larger_peak - peak <= grown * (size * 16 + 64)
    assert larger_saved - saved <= grown * (size * dtype.itemsize + 8 + 4)
    # The product, its copy in fp32, and for a soft-cap its slope; the weight, its casts, gradients.
    copies = 1 + (dtype != torch.float32) + 2 * (transform.softcap is not None)
    assert peak <= vocab * 4 * (chunk_size * copies + 6 * size) + 2**15


@dataclass
class Step:
    """Bytes of a forward and backward."""

    saved: int
    largest_saved: int
    largest_made: int
    """Elements of the largest result of an operator."""
    peak: int


class EveryPosition(PolicyModel):
    """The mutant: log-probs of prompts, too, before the scored ones are taken."""

    def _scored_hidden(self, block: Block, with_routing: bool) -> tuple[Tensor, nn.Module, None]:
        logits = self.model(block.input_ids, **self._options(block)).logits
        scored = logits.log_softmax(dim=-1).flatten(0, 1)[block.score_positions]
        return scored, nn.Identity(), None


def measure_step(kind: type[PolicyModel], prompt: int, vocab: int, name: Any, tied: bool) -> Step:
    (example,) = make_examples(1, prompt=(prompt, prompt), completion=(20, 20))
    model = tiny_model(vocab_size=vocab, tie_word_embeddings=tied)
    model.set_attn_implementation(SEGMENTS if name == "shared_prefix" else "sdpa")
    policy = kind(model)
    layout = build_layout([example], name)
    with Memory() as memory:
        pair_logps(policy, layout).sums.sum().backward()
    saved = saved_sizes(lambda: pair_logps(policy, layout).sums, policy)
    largest = max(math.prod(shape) for _, shape in memory.results)
    return Step(sum(saved), max(saved), largest, memory.peak)


@pytest.mark.parametrize("kind", [PolicyModel, EveryPosition])
@pytest.mark.parametrize("name", ["shared_prefix", "concatenated"])
@pytest.mark.parametrize("tied", [True, False])
def test_memory_has_no_term_of_prompt_length_times_vocabulary(tied, name, kind):
    """Doubling the prompt adds activations only; logits of all positions fail."""
    small, twice_small = (measure_step(kind, n, 500, name, tied) for n in (64, 128))
    large, twice_large = (measure_step(kind, n, 4000, name, tied) for n in (64, 128))
    logits = 64 * 3500 * 4  # bytes of what the larger vocabulary would add for the longer prompt
    holds = {
        "saved": twice_large.saved - large.saved == twice_small.saved - small.saved,
        "largest saved": twice_large.largest_saved < 4 * 4000 * 64,
        "largest made": twice_large.largest_made == large.largest_made,
        "peak": (twice_large.peak - large.peak) - (twice_small.peak - small.peak) < 0.05 * logits,
    }
    assert holds == dict.fromkeys(holds, kind is PolicyModel)


def test_chunk_sizes_follow_the_device():
    assert head_chunk_size(80 * GIB, 4096, 128_256) == 3840
    assert head_chunk_size(80 * GIB, 576, 49_152) == logprob_head.LARGEST_CHUNK
    assert head_chunk_size(24 * GIB, 4096, 128_256) == 1024
    assert head_chunk_size(GIB, 4096, 256_000) == logprob_head.CHUNK_STEP
    # An ordinary computer and a large server, SmolLM2-135M.
    assert head_chunk_size(4 * GIB, 576, 49_152) == 512
    assert head_chunk_size(8 * GIB, 576, 49_152) == 1024


def test_the_model_knows_its_chunk_size_by_the_device(monkeypatch):
    policy = PolicyModel(tiny_model())
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**16, "SC_PAGE_SIZE": 4096}.__getitem__)
    config = policy.model.config
    expected = head_chunk_size(2**28 // 4, config.hidden_size, config.vocab_size)
    assert expected not in (logprob_head.CHUNK_STEP, logprob_head.LARGEST_CHUNK)
    assert policy.head_chunk_size(torch.device("cpu")) == expected
