"""Which attention kernel is taken, on kernels imitated on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from preftune.batching.layout import build_layout
from preftune.errors import ModelError
from preftune.model import attention_varlen, layout_choice, layout_probe
from preftune.model.attention import FUSED, REGISTERED
from preftune.model.forward import PolicyModel, pair_logps
from preftune.model.layout_choice import LayoutChoice, choose_layout, use_layout
from tests.attention import imitated_varlen
from tests.examples import make_examples
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Clock:
    """Each look takes a second; a kernel may take longer, or give time back."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, device: torch.device) -> float:
        self.seconds += 1
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A machine where varlen can be tried, on a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(layout_probe, "_now", clock)
    monkeypatch.setattr(layout_choice, "why_not", lambda kernel, demands: None)
    try_kernels(monkeypatch, "varlen")
    return clock


def try_kernels(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> None:
    monkeypatch.setattr(layout_choice, "_candidates", lambda attention, device: kernels)


def take_varlen(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, cost: float, kernel: Callable = imitated_varlen
) -> None:
    def timed(*args: Any, **options: Any) -> Any:
        clock.seconds += cost
        return kernel(*args, **options)

    monkeypatch.setattr(attention_varlen, "varlen_attn", timed)


def choose(attention: Any = "auto", **options: Any) -> tuple[PolicyModel, LayoutChoice]:
    policy = PolicyModel(tiny_model(initializer_range=0.2))
    before = [parameter.clone() for parameter in policy.parameters()]
    choice = choose_layout(policy, "auto", attention, longest=120, **options)
    # A choice changes nothing but the attention function.
    assert not policy.model.training
    for parameter, old in zip(policy.parameters(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, old)
    return policy, choice


def taken(policy: PolicyModel) -> str:
    return str(policy.model.config._attn_implementation)


@pytest.mark.parametrize(("cost", "expected"), [(-0.1, "varlen"), (0.1, "sdpa")])
def test_the_fastest_right_kernel_is_taken(
    cost: float, expected: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_varlen(monkeypatch, clock, cost)
    try_kernels(monkeypatch, *FUSED)
    policy, choice = choose()
    assert (choice.name, choice.attention) == ("shared_prefix", expected)
    assert taken(policy) == REGISTERED[expected]
    assert choice.tried["sdpa"] == 1.0
    assert choice.tried["varlen"] == pytest.approx(1.0 + 2 * cost)  # two layers
    # This machine has no flash-attn, and FlexAttention has no backward on a CPU.
    assert "ModuleNotFoundError" in str(choice.tried["flash_attention_2"])
    assert "does not support backward on CPU" in str(choice.tried["flex"])


def top_left(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *rest: Any, **options: Any):
    """A kernel whose mask is aligned to the first query and the first key."""
    spans = range(len(cu_q) - 1)
    lengths = torch.minimum(cu_q.diff(), cu_k.diff())
    kept = torch.cat([torch.arange(int(lengths[i])) + cu_k[i] for i in spans])
    cut = torch.cat((cu_k[:1], lengths.cumsum(0))).int()
    maxima = int(cu_q.diff().max()), int(lengths.max())
    return imitated_varlen(query, key[kept], value[kept], cu_q, cut, *maxima, **options)


def no_gradient_of_keys(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
    return imitated_varlen(query, key.detach(), value, *rest, **options)


@pytest.mark.parametrize(
    ("kernel", "why"), [(top_left, "nats a token"), (no_gradient_of_keys, "gradient's norm")]
)
def test_a_wrong_kernel_is_never_taken(
    kernel: Callable, why: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_varlen(monkeypatch, clock, -0.1, kernel)
    policy, choice = choose()
    assert choice.attention == "sdpa"
    assert why in str(choice.tried["varlen"])
    assert taken(policy) == REGISTERED["sdpa"]
    with pytest.raises(ModelError, match=f"attn_implementation is 'varlen'.*{why}"):
        choose("varlen")


def test_a_kernel_by_name_is_proved_and_not_timed(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_varlen(monkeypatch, clock, 5.0)
    policy, choice = choose("varlen")
    assert choice == LayoutChoice("shared_prefix", "", "varlen")
    assert clock.seconds < 5.0 * 2 * 4  # probe and one forward, plain and by recomputation
    packed = pair_logps(policy, build_layout(make_examples(5), "shared_prefix")).sums
    plain = PolicyModel(tiny_model(initializer_range=0.2))
    padded = pair_logps(plain, build_layout(make_examples(5), "concatenated")).sums
    assert torch.allclose(packed, padded, atol=1e-4)


def test_a_row_too_large_to_try_ends_with_the_safe_kernel(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    take_varlen(monkeypatch, clock, -0.1)
    monkeypatch.setattr(layout_choice, "run_trial", too_large)
    policy, choice = choose()
    assert (choice.attention, taken(policy)) == ("sdpa", REGISTERED["sdpa"])
    assert "sdpa fails (OutOfMemoryError: no room)" in str(choice.tried["varlen"])


def test_scoring_needs_no_backward(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    take_varlen(monkeypatch, clock, -0.1, no_gradient_of_keys)
    try_kernels(monkeypatch, "varlen", "flex")
    _, choice = choose(with_backward=False)
    assert choice.attention == "varlen"
    assert isinstance(choice.tried["flex"], float)  # only its backward is missing on a CPU


def test_types_of_products_are_those_of_training(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that cannot compute in fp32 is probed as it will run."""

    def half_only(query: Any, *rest: Any, **options: Any) -> Any:
        assert query.dtype == torch.bfloat16
        return imitated_varlen(query, *rest, **options)

    take_varlen(monkeypatch, clock, -0.1, half_only)
    _, choice = choose(autocast=torch.bfloat16)
    assert choice.attention == "varlen"
    _, choice = choose()
    assert "AssertionError" in str(choice.tried["varlen"])


def test_a_cpu_tries_nothing() -> None:
    policy, choice = choose()
    assert choice == LayoutChoice("shared_prefix", "", "sdpa")
    assert taken(policy) == REGISTERED["sdpa"]


def test_a_kernel_by_name_that_is_not_for_this_machine_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"attn_implementation is 'flex'.*runs on CUDA GPUs only"):
        choose("flex")


def test_padded_pairs_say_what_computes_them() -> None:
    policy = PolicyModel(tiny_model())
    assert choose_layout(policy, "separate", "auto", longest=120).attention == "sdpa"
    assert choose_layout(policy, "auto", "eager", longest=120).attention == "sdpa"


def test_a_kernel_of_transformers_that_it_refuses_is_an_error() -> None:
    with pytest.raises(
        ModelError, match=r"attn_implementation is 'flash_attention_2', which Llama"
    ):
        choose_layout(PolicyModel(tiny_model()), "separate", "flash_attention_2", longest=120)


@pytest.mark.parametrize("name", ["varlen", "sdpa"])
def test_other_ranks_follow(name: str) -> None:
    policy = PolicyModel(tiny_model())
    use_layout(policy, LayoutChoice("shared_prefix", "", name))
    assert taken(policy) == REGISTERED[name]  # type: ignore[index]
    padded = PolicyModel(tiny_model())
    use_layout(padded, LayoutChoice("concatenated", "why", "eager"))
    assert taken(padded) == "eager"
