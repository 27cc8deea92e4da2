"""Run by torchrun: processes that share packed rows against each of them alone, in fp64.

torchrun --nproc_per_node 2 share_rows.py SIZE CASE...
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from preftune.batching.layout import Layout, build_layout
from preftune.batching.shards import RowPart
from preftune.distributed import sequence
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.model.attention import SEGMENTS
from preftune.model.forward import SequenceLogps, pair_logps
from preftune.schema import Completion, TokenizedExample
from tests.examples import batch
from tests.memory import saved_sizes
from tests.policies import MIXTURES, PACKED, long_rope, make_policy
from tests.syncs import CountSyncs

LIMIT = 23
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = PACKED | {
    "one key head": ("Llama", {"num_key_value_heads": 1}),
    "3 key heads": (
        "Llama",
        {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3},
    ),
    "longrope": ("Llama", {"rope_parameters": long_rope(LIMIT)}),
    "dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": LIMIT}),
}


def edge() -> TokenizedExample:
    """One answer ends a token behind the limit: one process holds that position, and no filling."""
    answers = Completion(tuple(range(20, 34))), Completion(tuple(range(40, 52)))
    ids = tuple(range(5, 15))
    return TokenizedExample("edge", ids, answers, ("chosen", "rejected"), "edge", 99)


def run(
    policy: Any, examples: list[TokenizedExample], layout: Layout, with_routing: bool
) -> tuple[SequenceLogps, Tensor]:
    """Log-probs, and the gradient of a sum that weighs every answer differently."""
    policy.zero_grad(set_to_none=True)
    made = build_layout(examples, layout)
    result = pair_logps(policy, made, with_alignment=True, with_routing=with_routing)
    loss = (result.counted * torch.linspace(0.5, 1.5, len(result.sums))).sum()
    if result.routing is not None:
        loss = loss + 3.0 * result.routing.loss
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    return result, torch.cat([gradient.flatten() for gradient in gradients])


def check(name: str, runtime: Runtime) -> None:
    """Log-probs, what follows from them, and gradients."""
    group = runtime.sequence_group
    assert group is not None
    # Grouped products of experts have no fp64, and norms and rotations compute in fp32.
    is_mixture = name in MIXTURES
    with_routing = is_mixture and name != "deepseek_v3"  # which does not show its routers
    policy = make_policy(*CASES[name], dtype=torch.float32 if is_mixture else torch.float64)
    close = {"rtol": 1e-4, "atol": 1e-4} if is_mixture else {"rtol": 1e-6, "atol": 1e-6}
    policy.model.set_attn_implementation(SEGMENTS)
    policy.sequence_group = group
    examples = [edge()] if name in ("longrope", "dynamic") else [*batch(), edge()]
    whole = Layout("shared_prefix", policy.limits, ld_alpha=0.5)
    part = replace(whole, part=RowPart(group.rank, group.size))
    alone, expected = run(policy, examples, whole, with_routing)
    shared, own = run(policy, examples, part, with_routing)
    total = runtime.all_reduce(own) / runtime.data_size  # groups side by side compute the same
    for field in ("sums", "weighted", "alignment"):
        got, wanted = getattr(shared, field), getattr(alone, field)
        assert torch.allclose(got, wanted, **close), (name, field, got - wanted)
    assert torch.equal(shared.lengths, alone.lengths)
    for got, wanted in zip(shared.per_token, alone.per_token, strict=True):
        assert torch.allclose(got, wanted, **close), (name, "per_token")
    if shared.routing is not None and alone.routing is not None:
        assert torch.allclose(shared.routing.loss, alone.routing.loss, **close), name
    off = float((total - expected).norm() / expected.norm())
    assert off < close["rtol"], (name, off)
    if runtime.is_main:
        print(f"{name}: {off:.1e}", flush=True)


def check_mutant(runtime: Runtime) -> None:
    """Were the gradient of the sum a sum, too, it would be too large: `check` would see that."""
    right = sequence._Total.backward
    size = runtime.world_size // runtime.data_size

    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * size, None

    sequence._Total.backward = staticmethod(backward)
    try:
        check("llama", runtime)
    except AssertionError as error:
        (_, off) = error.args[0]
        assert abs(off - (size - 1)) < 1e-6, off
    else:
        raise SystemExit("a gradient that is too large was not seen")
    finally:
        sequence._Total.backward = right


def shared_llama(runtime: Runtime) -> tuple[Any, RowPart]:
    """A policy whose rows are shared, and this rank's part of them."""
    group = runtime.sequence_group
    assert group is not None
    policy = make_policy(*CASES["llama"])
    policy.model.set_attn_implementation(SEGMENTS)
    policy.sequence_group = group
    return policy, RowPart(group.rank, group.size)


def check_waits(runtime: Runtime) -> None:
    """Nothing makes the host read a number of the device."""
    policy, part = shared_llama(runtime)
    layout = build_layout(batch(), Layout("shared_prefix", policy.limits, part=part))
    with CountSyncs() as counter:
        pair_logps(policy, layout, with_alignment=True).sums.sum().backward()
    assert not counter.seen, counter.seen


def check_memory(runtime: Runtime) -> None:
    """What is kept for the backward shrinks with the tokens; masks of attention do not."""
    policy, own = shared_llama(runtime)
    kept = []
    for part in (None, own):
        layout = build_layout(batch(), Layout("shared_prefix", policy.limits, part=part))
        kept.append(sum(saved_sizes(partial(pair_logps, policy, layout), policy)))
    assert kept[1] < (1 / own.size + 0.1) * kept[0], kept
    if runtime.is_main:
        print(f"kept for the backward: {kept[1] / kept[0]:.3f}", flush=True)


def main() -> None:
    """Check the cases of the command line."""
    torch.set_num_threads(1)
    runtime = Runtime("fp32", 0)
    runtime.share_rows(int(sys.argv[1]))
    for name in sys.argv[2:] or CASES:
        check(name, runtime)
    check_mutant(runtime)
    check_waits(runtime)
    check_memory(runtime)
    leave_process_group()


if __name__ == "__main__":
    main()
