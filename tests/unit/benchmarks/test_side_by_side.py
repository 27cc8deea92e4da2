"""The pure parts of the benchmark against TRL: counts by hand, gates that fail, who is compared."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.side_by_side.arms import arms_for
from benchmarks.side_by_side.counts import (
    Lengths,
    ModelShape,
    Work,
    needed_flops,
    step_flops,
    token_counts,
    work_of,
)
from benchmarks.side_by_side.gates import differences, largest, loss_differences
from benchmarks.side_by_side.summary import summarise
from preftune.batching.layout import build_layout
from preftune.schema import Completion, TokenizedExample

SHAPE = ModelShape(backbone=100, head=50, layers=2, width=8)
PAIRS = [Lengths(3, 2, 1, 7), Lengths(3, 1, 4, 7), Lengths(2, 5, 2, 8)]


def test_work_of_each_layout_by_hand():
    # Rows of 5, 4 / 4, 7 / 7, 4 tokens; padded to 7, or to 7 and 7 on their own sides.
    assert work_of(PAIRS, "trl") == Work(tokens=6 * 7, scored=6 * 6, scores=6 * 49)
    assert work_of(PAIRS, "trl_compact") == Work(6 * 7, 15, 6 * 49)
    assert work_of(PAIRS, "concatenated") == Work(6 * 7, 15, 6 * 28)
    assert work_of(PAIRS[:1], "separate") == Work(5 + 4, 3, 15 + 10, Work(5, 2, 15))
    # [p p p c c] r | c, r r r r on the first prompt | [p p c c c c c] r r
    scores = 15 + 1 * 4 + 1 * 4 + 4 * 7 + 28 + 2 * 4
    assert work_of(PAIRS, "packed") == Work(3 + 3 + 5 + 2 + 7, 15, scores)


def test_packed_tokens_are_those_of_preftunes_own_layout():
    examples = [
        TokenizedExample(
            f"row-{i}",
            tuple(range(pair.prompt_key, pair.prompt_key + pair.prompt)),
            (Completion((1,) * pair.chosen), Completion((2,) * pair.rejected)),
            ("chosen", "rejected"),
            "made",
            pair.prompt_key,
        )
        for i, pair in enumerate(PAIRS)
    ]
    assert build_layout(examples, "shared_prefix").num_tokens == work_of(PAIRS, "packed").tokens
    counts = token_counts([PAIRS])
    assert counts["unpadded"] == build_layout(examples, "concatenated").num_tokens
    assert (counts["padded"], counts["shared"], counts["scored"]) == (42, 20, 15)


def test_step_arithmetic_by_hand():
    work = Work(tokens=10, scored=4, scores=30)
    forward = 2 * 100 * 10 + 2 * 50 * 4 + 4 * 2 * 8 * 30
    backbone = forward - 2 * 50 * 4
    plain = 3 * forward + 2 * 50 * 4
    assert step_flops(work, SHAPE) == plain
    assert step_flops(work, SHAPE, checkpointing=True) == plain + backbone
    assert step_flops(work, SHAPE, online_reference=True) == plain + forward
    assert step_flops(replace(work, again=work), SHAPE) == plain + forward


def test_needed_arithmetic_counts_a_shared_prompt_once():
    # Prompts 3 and 2: 6 + 3 scores; answers see their prompt and, causally, themselves.
    scores = 6 + 3 + (6 + 3) + (3 + 1) + (3 + 1) + (12 + 10) + (10 + 15) + (4 + 3)
    expected = 3 * (2 * 100 * 20 + 2 * 50 * 15 + 4 * 2 * 8 * scores)
    assert needed_flops(PAIRS, SHAPE) == expected


def record(**changes: Any) -> dict[str, Any]:
    """Two steps of two pairs."""
    sums = [[-100.0, -50.0], [-101.0, -49.0]]
    names = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    made: dict[str, Any] = {name: copy.deepcopy(sums) for name in names}
    return made | {"losses": [0.7, 0.6], "grad_norms": [4.0, 5.0]} | changes


def test_gate_passes_rounding():
    off = record(losses=[0.7 * (1 + 5e-6), 0.6 * (1 + 9e-4)], grad_norms=[4.0003, 5.004])
    off["policy_chosen"][0][1] += 9e-4
    assert differences(record(), off) == []
    assert largest(record(), off)["nats_at_step_1"] == pytest.approx(9e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("losses", [0.7002, 0.6]),
        ("losses", [0.7, 0.6007]),
        ("losses", [0.7, float("nan")]),
        ("grad_norms", [8.0, 5.0]),
        ("grad_norms", [4.0, 5.006]),
        ("reference_rejected", [[-100.0, -50.002], [-101.0, -49.0]]),
        ("policy_chosen", [[-100.0, -50.0], [-101.0, -49.06]]),
    ],
)
def test_gate_names_what_differs(name, value):
    (difference,) = differences(record(), record(**{name: value}))
    assert difference.what == name
    assert f"{name} of step {difference.step}" in str(difference)


def test_gate_refuses_records_of_different_length():
    with pytest.raises(ValueError, match="2 steps of preftune, 1 of TRL"):
        differences(record(), record(losses=[0.7]))


def test_losses_of_timed_arms_are_compared_step_by_step():
    assert loss_differences({"a": [0.5, 0.4], "b": [0.5, 0.40039]}) == []
    (text,) = loss_differences({"a": [0.5, 0.4], "b": [0.5, 0.41]})
    assert text == "loss of step 2: a 0.4, b 0.41"


def test_summary_compares_arms_of_the_same_round_without_the_warm_up():
    arms = arms_for("cpu", ["trl_tuned", "preftune"], [])

    def run(name: str, number: int, seconds: float) -> dict[str, Any]:
        times = [99.0, seconds, seconds]
        return {
            "arm": name,
            "round": number,
            "cpu": times,
            "wall": times,
            "peak_mib": 1024 * seconds,
            "reference_pass": {"cpu": 9.0, "wall": 9.0},
        }

    rate = {"square": {"cpu": 1e6, "wall": 1e6}}
    batch = [list(vars(pair).values()) for pair in PAIRS]
    setting = {
        "pairs": {"random": {"batches": [batch] * 3}},
        "model": {"shape": vars(SHAPE)},
        "batch_size": 3,
        "warmup": 1,
        "bf16": False,
        "rates": [{"fp32": rate, "bf16": rate}] * 2,
        # The second round ran on a machine twice as slow.
        "runs": [
            run("trl_tuned", 0, 6.0),
            run("preftune", 0, 2.0),
            run("preftune", 1, 4.0),
            run("trl_tuned", 1, 12.0),
        ],
    }
    trl, ours = summarise(setting, arms, "cpu")
    assert trl["time_ratio"] == trl["memory_ratio"] == 3.0
    predicted = step_flops(work_of(PAIRS, "trl"), SHAPE) / step_flops(
        work_of(PAIRS, "packed"), SHAPE
    )
    assert trl["measured_over_predicted"] == pytest.approx(3.0 / predicted)
    assert ours["seconds_per_pair"]["cpu"] == {"median": 1.0, "minimum": pytest.approx(2 / 3)}
    assert ours["first_step_seconds"] == 99.0
    assert ours["reference_seconds_per_pair"] == 1.0
    share = needed_flops(PAIRS, SHAPE) / 1e6
    assert ours["share_of_products"] == pytest.approx((share / 2 + share / 4) / 2)


def test_an_unknown_arm_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="trl_tune: on this device there are trl_default"):
        arms_for("cpu", ["trl_tune"], [])
    assert [arm.name for arm in arms_for("cuda", None, ["flex"])][-1] == "preftune_flex"
    assert all(arm.layout != "trl" for arm in arms_for("cuda", None, []))
