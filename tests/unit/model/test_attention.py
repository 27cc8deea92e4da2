"""Kernels of packed rows against every sequence computed by itself, on the CPU."""

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.model import attention_flex, attention_varlen
from preftune.model.attention import Demands, LayerCall, PackedKernel, why_not
from preftune.model.attention_rules import ScoreRules
from preftune.model.attention_spans import span_attention
from tests.attention import (
    gradients,
    imitated_flash,
    imitated_varlen,
    make_inputs,
    make_segments,
    plain_attention,
    rules,
)

CPU = torch.device("cpu")
seeds = st.integers(0, 10_000)
all_rules = st.builds(
    rules,
    scale=st.sampled_from([None, 0.3]),
    window=st.none() | st.integers(1, 40),
    softcap=st.sampled_from([None, 2.0]),
)


@pytest.fixture(autouse=True)
def _imitations(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = imitated_flash
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_varlen, "varlen_attn", imitated_varlen)


def check(kernel: Any, seed: int, rules: ScoreRules) -> None:
    segments = make_segments(seed)
    inputs = make_inputs(segments)
    expected = plain_attention(*inputs, segments, rules)
    got = kernel(*inputs, segments, rules)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11)
    for one, other in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rules=all_rules)
def test_spans_equal_sequences(seed: int, rules: ScoreRules) -> None:
    check(span_attention, seed, rules)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rules=all_rules.filter(lambda r: r.softcap is None))
def test_varlen_arguments_make_sequences(seed: int, rules: ScoreRules) -> None:
    check(attention_varlen.varlen_attention, seed, rules)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rules=all_rules)
def test_flash_arguments_make_sequences(seed: int, rules: ScoreRules) -> None:
    check(attention_varlen.flash_attention, seed, rules)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, window=st.none() | st.integers(1, 40), block_size=st.integers(1, 40))
def test_the_block_mask_is_that_of_its_own_mask(
    seed: int, window: int | None, block_size: int
) -> None:
    """Block lists from the spans equal those that torch finds by asking for every pair."""
    segments = make_segments(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_flex, "BLOCK_SIZE", block_size)
        ours = attention_flex.block_mask(segments, window, CPU)
    length = segments.spans[-1].stop
    theirs = create_block_mask(
        ours.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=block_size
    )
    for name in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(ours, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks"))
        indices, expected = getattr(ours, f"{name}_indices"), getattr(theirs, f"{name}_indices")
        assert torch.equal(indices, expected)
        assert (indices.dtype, indices.shape) == (expected.dtype, expected.shape)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("longest", [10, 120])
def test_flex_equals_sequences(window: int | None, softcap: float | None, longest: int) -> None:
    """FlexAttention has no backward on CPUs; several blocks, and less than one."""
    torch.compiler.reset()  # a graph a case: more than torch compiles of one function
    segments = make_segments(seed=5, longest=longest)
    inputs = [tensor.detach() for tensor in make_inputs(segments, dtype=torch.float32)]
    case = rules(scale=0.3, window=window, softcap=softcap)
    expected = plain_attention(*inputs, segments, case)
    got = attention_flex.block_attention(*inputs, segments, case)
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, atol=2e-6)


def test_the_windows_and_caps_of_these_tests_matter() -> None:
    segments = make_segments(5, longest=120)
    inputs = make_inputs(segments)
    plain = plain_attention(*inputs, segments, rules())
    for case in (rules(window=20), rules(softcap=2.0), rules(scale=0.3)):
        assert (plain_attention(*inputs, segments, case) - plain).abs().max() > 0.01


@pytest.mark.parametrize("window", [None, 3])
def test_torch_takes_the_arguments_of_varlen(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own operator with its shapes and its backward; only the kernel wants a GPU."""
    monkeypatch.undo()
    segments = make_segments(5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = make_inputs(segments, dtype=torch.bfloat16)
        output = attention_varlen.varlen_attention(*inputs, segments, rules(window=window))
        assert output.shape == (1, segments.spans[-1].stop, 4, 16)
        got = torch.autograd.grad(output, inputs, torch.ones_like(output))
        assert [g.shape for g in got] == [tensor.shape for tensor in inputs]


def test_under_autocast_kernels_get_one_type() -> None:
    """Rotation leaves queries in fp32 where values are bf16."""
    seen = set()

    def kernel(query: Any, key: Any, value: Any, *lengths: Any, **_: Any) -> Any:
        seen.update((query.dtype, key.dtype, value.dtype))
        return query

    segments = make_segments(5)
    query, key, value = make_inputs(segments, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(attention_varlen, "varlen_attn", kernel)
        output = attention_varlen.varlen_attention(query, key, value.bfloat16(), segments, rules())
    assert seen == {torch.bfloat16}
    assert output.dtype == torch.bfloat16


class Counting(TorchDispatchMode):
    """Counts what a host would wait for, and the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "item")
        self.waits += any(name in str(func) for name in waiting)
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_layers_share_the_arrays_of_a_forward_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernel(query: Any, *_: Any, **__: Any) -> Any:
        return query

    monkeypatch.setattr(attention_varlen, "varlen_attn", kernel)
    segments = make_segments(5)
    inputs = make_inputs(segments)
    with Counting() as first:
        attention_varlen.varlen_attention(*inputs, segments, rules())
        attention_flex.block_mask(segments, None, CPU)
        attention_flex.block_mask(segments, 4, CPU)
    with Counting() as second:
        attention_varlen.varlen_attention(*inputs, segments, rules())
        shared = attention_flex.block_mask(segments, 4, CPU)
    assert first.waits == second.waits == 0
    assert second.calls < 20 < first.calls
    assert shared is attention_flex.block_mask(segments, 4, CPU)
    assert shared is not attention_flex.block_mask(segments, None, CPU)


GPU = torch.device("cuda", 0)
PLAIN = LayerCall(0, 64, 64, False, False)


def demands(
    call: LayerCall = PLAIN,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = GPU,
    has_dropout: bool = False,
) -> Demands:
    return Demands(device, dtype, has_dropout, [PLAIN, call])


@pytest.mark.parametrize(
    ("needs", "varlen", "flash", "flex"),
    [
        (demands(), None, None, None),
        (demands(device=CPU), *["CUDA GPUs only"] * 3),
        (demands(has_dropout=True), *["disable_dropout"] * 3),
        (demands(PLAIN._replace(has_sinks=True)), *["sinks"] * 3),
        (demands(PLAIN._replace(has_softcap=True)), "soft-capping", None, None),
        (demands(dtype=torch.float32), "not in float32", "not in float32", None),
        (demands(dtype=torch.float64), *["float64"] * 3),
        (demands(PLAIN._replace(head_dim=192)), "not 192 and 64", "not 192 and 64", None),
        (demands(LayerCall(0, 320, 320, False, False)), "not 320", "not 320", None),
        (demands(LayerCall(0, 20, 20, False, False)), "not 20", "not 20", None),
        (demands(LayerCall(0, 8, 8, False, False)), None, None, "at least 16"),
    ],
)
def test_what_a_kernel_cannot_express_is_known_before(
    needs: Demands,
    varlen: str | None,
    flash: str | None,
    flex: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("preftune.model.attention.find_spec", lambda name: object())
    said: dict[PackedKernel, str | None] = {
        "sdpa": None,
        "varlen": varlen,
        "flash_attention_2": flash,
        "flex": flex,
    }
    for kernel, expected in said.items():
        got = why_not(kernel, needs)
        if expected is None:
            assert got is None
        else:
            assert expected in (got or "")


def test_old_gpus_and_absent_packages_are_known_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("preftune.model.attention.find_spec", lambda name: None)
    assert "capability 8.0" in (why_not("varlen", demands()) or "")
    assert why_not("flash_attention_2", demands()) == "the package flash-attn is not installed"
    assert why_not("flex", demands()) is None
