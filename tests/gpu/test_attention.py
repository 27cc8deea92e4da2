"""Fused kernels of packed rows on a GPU: values and gradients of every sequence by itself."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from preftune.batching.layout import build_layout
from preftune.model.attention import FUSED, REGISTERED, SEGMENTS, Demands, LayerCall, why_not
from preftune.model.attention_flex import block_attention
from preftune.model.attention_rules import ScoreRules
from preftune.model.attention_spans import span_attention
from preftune.model.attention_varlen import flash_attention, varlen_attention
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import choose_layout
from tests.attention import gradients, make_inputs, make_segments, plain_attention, rules
from tests.examples import make_examples
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KERNELS: dict[str, Any] = {
    "sdpa": span_attention,
    "varlen": varlen_attention,
    "flash_attention_2": flash_attention,
    "flex": block_attention,
}
# Of values of size 1, and of their gradients: rounding of the type that products are computed in.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
CASES = {
    "plain": rules(),
    "scaled": rules(scale=0.3),
    "window": rules(window=20),
    "window of one": rules(window=1),
    "softcap": rules(softcap=2.0),
    "softcap and window": rules(softcap=2.0, window=20),
}


def skip_unless_expressed(kernel: Any, dtype: torch.dtype, case: ScoreRules) -> None:
    calls = [LayerCall(0, 64, 64, case.softcap is not None, False)]
    why = why_not(kernel, Demands(torch.device("cuda"), dtype, False, calls))
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_kernel_equals_sequences(
    kernel: Any, dtype: torch.dtype, case: str, key_heads: int
) -> None:
    skip_unless_expressed(kernel, dtype, CASES[case])
    # Rows of several blocks and of less than one; the same kernel must serve both.
    for seed, longest in ((1, 5), (5, 200), (6, 90)):
        segments = make_segments(seed, longest=longest)
        shape = {"key_heads": key_heads, "head_dim": 64, "dtype": dtype}
        inputs = make_inputs(segments, **shape, device="cuda")
        exact = tuple(t.detach().cpu().double().requires_grad_() for t in inputs)
        expected = plain_attention(*exact, segments, CASES[case])
        got = KERNELS[kernel](*inputs, segments, CASES[case])
        assert got.shape == expected.shape
        assert (got.cpu().double() - expected).abs().max() <= TOLERANCES[dtype]
        pairs = zip(gradients(got, inputs), gradients(expected, exact), strict=True)
        for one, other in pairs:
            off = (one.cpu().double() - other).norm()
            # A window of one leaves queries and keys with a gradient of zero.
            assert off <= TOLERANCES[dtype] * (other.norm() + other.numel() ** 0.5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_kernel_waits_for_the_device(kernel: Any) -> None:
    skip_unless_expressed(kernel, torch.bfloat16, rules())
    for once in (False, True):
        segments = make_segments(5, longest=200)
        inputs = make_inputs(segments, head_dim=64, dtype=torch.bfloat16, device="cuda")
        # The first call may compile, which asks the device what it likes.
        torch.cuda.set_sync_debug_mode("error" if once else "default")
        try:
            output = KERNELS[kernel](*inputs, segments, rules(window=20))
            output.backward(torch.ones_like(output))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def policy(**settings: Any) -> PolicyModel:
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    return PolicyModel(tiny_model(**(shape | {"initializer_range": 0.2} | settings)).cuda())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["auto", *FUSED])
def test_a_model_takes_a_kernel_and_keeps_its_numbers(
    attention: Any, autocast: torch.dtype | None
) -> None:
    if attention != "auto":
        skip_unless_expressed(attention, autocast or torch.float32, rules())
    model, plain = policy(), policy()
    choice = choose_layout(model, "auto", attention, longest=300, autocast=autocast)
    assert choice.name == "shared_prefix"
    assert model.model.config._attn_implementation == REGISTERED[choice.attention]  # type: ignore[index]
    if attention == "auto":
        assert {"sdpa", *FUSED} == choice.tried.keys()
        timed = {kernel: s for kernel, s in choice.tried.items() if isinstance(s, float)}
        assert choice.attention == min(timed, key=timed.__getitem__)
        assert "flex" in timed
        assert ("varlen" in timed) == (autocast is not None)
    else:
        assert choice.attention == attention
    plain.model.set_attn_implementation(SEGMENTS)
    layout = build_layout(make_examples(9, seed=3), "shared_prefix").to(torch.device("cuda"))
    results = []
    for each in (model, plain):
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            sums = pair_logps(each, layout).sums
        sums.sum().backward()
        norms = [p.grad.double().norm() for p in each.parameters() if p.grad is not None]
        results.append((sums.detach() / layout.blocks[0].lengths, torch.stack(norms)))
    tolerance = 1e-4 if autocast is None else 0.05
    assert (results[0][0] - results[1][0]).abs().max() <= tolerance
    assert torch.allclose(results[0][1], results[1][1], rtol=tolerance * 2, atol=1e-6)


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="needs the package flash-attn")
def test_padded_pairs_take_flash_attention_where_packing_is_not_wanted() -> None:
    model = policy()
    choice = choose_layout(
        model, "concatenated", "flash_attention_2", longest=300, autocast=torch.bfloat16
    )
    assert choice.attention == model.model.config._attn_implementation == "flash_attention_2"
