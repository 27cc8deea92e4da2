"""What each device holds: parts by hand, and the sums of docs/scaling.md."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.config.planning import PlanConfig
from preftune.planning.engines import Sizes, divide
from preftune.planning.work import Update, Work

N = 1_000_000
SIZES = Sizes(
    weights=4 * N,
    trained=4 * N,
    trained_numbers=N,
    update=Update(state=8 * N, passing=0),
    step=Work(
        peak={"weights": 4 * N, "weight copies": 2 * N, "activations": 5 * N, "head chunk": N},
        moving={"weight copies": 2 * N, "activations": 5 * N, "head chunk": N},
    ),
    scoring=Work(peak={}, moving={"activations": N}),
    largest_layer=N // 10,
    outside=N // 2,
    gathered_share=0.5,
)


def config(**options: Any) -> PlanConfig:
    return PlanConfig(model_name_or_path="m", dataset_name="d.jsonl", device="H100", **options)


def step_of(**options: Any) -> dict[str, int]:
    held = divide(SIZES, config(**options))
    return next(p.parts for p in held.phases if p.name == "forward and backward")


def test_one_process_holds_all():
    parts = step_of()
    assert parts == SIZES.step.peak | {"optimizer": 8 * N}


def test_eighteen_bytes_a_number_on_several_processes_and_the_buckets():
    """With several micro-batches a step: else gradients come when copies go."""
    peak = SIZES.step.peak | {"gradients": 4 * N}
    sizes = replace(SIZES, step=replace(SIZES.step, peak=peak))
    held = divide(sizes, config(num_processes=2, gradient_accumulation_steps=2))
    parts = next(p.parts for p in held.phases if p.name == "forward and backward")
    number = sum(parts[key] for key in ("weights", "weight copies", "gradients", "optimizer"))
    assert number == 18 * N
    assert parts["buckets"] == 4 * N


@pytest.mark.parametrize(
    ("options", "weights", "gradients", "optimizer", "twins"),
    [
        ({"zero_stage": 1}, 4 * N, 4 * N, 2 * N, N),
        ({"zero_stage": 2}, 4 * N, N, 2 * N, N),
        ({"zero_stage": 3}, N, N, 2 * N, N),
        ({"fsdp": "full_shard"}, N, N, 2 * N, None),
        ({"fsdp": "hybrid_shard", "fsdp_shard_size": 2}, 2 * N, 2 * N, 4 * N, None),
    ],
)
def test_engines_cut_what_they_say(options, weights, gradients, optimizer, twins):
    parts = step_of(num_processes=4, **options)
    assert parts["weights"] == weights
    assert parts["gradients"] == gradients
    assert parts["optimizer"] == optimizer
    assert parts.get("fp32 copy") == twins
    assert parts["activations"] == 5 * N  # of its own rows


def test_layers_at_work_are_whole():
    parts = step_of(num_processes=4, fsdp="full_shard")
    # Embeddings and head, the layer at work and the next one, in bf16.
    assert parts["gathered"] == (N // 2 + 2 * N // 10) // 2
    # A layer's gradients in bf16, and in fp32 on their way.
    assert parts["gathered gradients"] == N // 20 + N // 10


def test_what_is_moved_to_the_host_is_there():
    offload = {"offload_optimizer": True, "offload_param": True}
    held = divide(SIZES, config(num_processes=4, zero_stage=3, **offload))
    assert held.host == {"fp32 copy": 4 * N, "optimizer": 8 * N, "weights": 4 * N}
    assert not any("optimizer" in phase.parts for phase in held.phases)
    held = divide(SIZES, config(num_processes=4, fsdp="full_shard", fsdp_offload_params=True))
    assert held.host == {"weights": 4 * N, "gradients": 4 * N, "optimizer": 8 * N}


def test_rows_are_shared_under_sequence_parallelism():
    parts = step_of(num_processes=4, sequence_parallel_size=4)
    assert parts["activations"] == 5 * N // 4
    assert parts["head chunk"] == N // 4
    assert parts["weight copies"] == 2 * N


ENGINES = (
    {},
    {"zero_stage": 0},
    {"zero_stage": 1, "offload_optimizer": True},
    {"zero_stage": 2},
    {"zero_stage": 3},
    {"fsdp": "full_shard"},
    {"fsdp": "hybrid_shard"},
)


@given(
    number=st.sampled_from([1, 2, 3, 8, 64]),
    engine=st.sampled_from(ENGINES),
    sync=st.booleans(),
    share=st.floats(0, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_parts_sum_to_the_total_and_more_devices_never_take_more(number, engine, sync, share):
    options = dict(engine)
    if sync and not engine:
        options["sync_reference"] = True
    held = divide(SIZES, config(num_processes=number, **options)).with_slack(share)
    for phase in held.phases:
        assert phase.total == sum(phase.parts.values())
        assert all(size > 0 or part == "allocator" for part, size in phase.parts.items())
        made = phase.total - phase.parts["allocator"] - phase.parts.get("weights", 0)
        assert phase.parts["allocator"] == round(share * made)
    assert held.fullest.total == max(phase.total for phase in held.phases)
    if number > 1 and engine:
        more = divide(SIZES, config(num_processes=2 * number, **options)).with_slack(share)
        assert more.fullest.total <= held.fullest.total
