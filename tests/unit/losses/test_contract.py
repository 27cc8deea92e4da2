"""What config, the step and the checks may rely on: every loss by its name, and those on pairs."""

import dataclasses
import inspect

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import LOSS_SPECS, DPOLossType, Loss, PairLogps, UnpairedLoss, make_loss
from preftune.losses.knobs import KNOBS
from tests.loss_knobs import ON_PAIRS, knobs_given, other_value

every_name = pytest.mark.parametrize("loss_type", DPOLossType)
every_loss = pytest.mark.parametrize("loss_type", ON_PAIRS)
nats = st.floats(-500, 0, allow_subnormal=False)


def variants(loss_type: DPOLossType) -> list[dict[str, float | str]]:
    """The defaults, each word of each knob that takes words, and a smoothed form."""
    spec = LOSS_SPECS[loss_type]
    words = [{name: word} for name in spec.knobs for word in KNOBS[name].choices]
    smoothed = [{"label_smoothing": 0.25}] if "label_smoothing" in spec.knobs else []
    return [{}, *words, *smoothed]


every_variant = pytest.mark.parametrize(
    ("loss_type", "knobs"),
    [(loss, knobs) for loss in ON_PAIRS for knobs in variants(loss)],
    ids=lambda part: "-".join(map(str, part.values())) if isinstance(part, dict) else str(part),
)


def one(*sums: float, lengths=(1, 1), dtype=torch.float64) -> PairLogps:
    """One pair, its policy's sums with gradient: chosen, rejected and the same of the reference."""
    policy = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in sums[:2]]
    rest = [torch.tensor([x], dtype=dtype) for x in (*sums[2:], -0.5, -0.25, 0.75)]
    return PairLogps(
        *policy,
        *(torch.tensor([n]) for n in lengths),
        *rest,
        prompt=torch.tensor([-7.0], dtype=dtype),
        prompt_lengths=torch.tensor([3]),
    )


@every_name
def test_the_name_makes_the_loss_with_its_own_defaults(loss_type):
    loss = make_loss(loss_type)
    assert loss.loss_type is loss_type
    assert isinstance(loss, UnpairedLoss if LOSS_SPECS[loss_type].unpaired else Loss)
    assert type(loss).__module__ == f"preftune.losses.{loss_type.value}"
    assert dataclasses.asdict(loss) == dict(LOSS_SPECS[loss_type].knobs)


@every_name
def test_every_knob_given_arrives(loss_type):
    given_values = knobs_given(loss_type)
    assert dataclasses.asdict(make_loss(loss_type, **given_values)) == given_values


@every_loss
def test_every_knob_moves_the_value(loss_type, pairs, make_batch):
    """No knob is accepted and ignored."""
    # One pair ahead and one behind, and one whose weight is capped.
    logps = make_batch([pairs[name] for name in ("preferred", "not_preferred", "weight_capped")])
    for name in LOSS_SPECS[loss_type].knobs:
        other = KNOBS[name].only_with
        needed = {other.name: other.value} if other else {}
        plain = make_loss(loss_type, **needed)(logps).values
        moved = make_loss(loss_type, **needed, **{name: other_value(loss_type, name)})(logps)
        assert (moved.values - plain).abs().max() > 1e-4, name


@every_name
def test_the_docstring_says_everything_that_the_docs_need(loss_type):
    """`docs/losses.md` is made of it."""
    doc = inspect.getdoc(type(make_loss(loss_type)))
    assert "value = " in doc.split("\n\n")[1]
    for section in (
        "Args:",
        "Raises:",
        "Example:",
        "Source: ",
        "Deviates: ",
        "Settings: ",
        "Curves: ",
    ):
        assert f"\n{section}" in doc, section
    arguments = doc.split("\nArgs:\n")[1].split("\n\n")[0]
    assert [line.split(":")[0].strip() for line in arguments.splitlines() if line[4] != " "] == [
        *LOSS_SPECS[loss_type].knobs
    ]


@every_name
def test_knobs_of_others_and_unknown_ones_are_refused(loss_type):
    for name, knob in KNOBS.items():
        value = knob.choices[0] if knob.choices else 0.25
        if name not in LOSS_SPECS[loss_type].knobs:
            message = f"{name} is given, and the loss {loss_type} does not read it, only "
        elif knob.only_with:
            message = f"{name} is given, and the loss {loss_type} reads it only with "
        else:
            continue
        with pytest.raises(ValueError, match=message):
            make_loss(loss_type, **{name: value})
    with pytest.raises(ValueError, match=r"bta is no knob of a loss; did you mean beta\?"):
        make_loss(loss_type, bta=0.1)


@every_name
def test_knobs_out_of_range_are_refused_all_at_once(loss_type):
    bad = {name: -1.0 for name in LOSS_SPECS[loss_type].applying({}) if not KNOBS[name].choices}
    with pytest.raises(ValueError) as caught:
        make_loss(loss_type, **bad)
    problems = [LOSS_SPECS[loss_type].knob(name).problem(-1.0) for name in bad]
    assert None not in problems
    assert str(caught.value) == f"{loss_type}: " + "; ".join(problems)


@every_loss
@pytest.mark.parametrize(
    "missing", [["ref_chosen"], ["ref_rejected"], ["ref_chosen", "ref_rejected"]]
)
def test_the_reference_is_read_exactly_where_the_spec_says(loss_type, missing, pairs, make_batch):
    logps = dataclasses.replace(make_batch([pairs["preferred"]]), **dict.fromkeys(missing))
    loss = make_loss(loss_type)
    if LOSS_SPECS[loss_type].needs_reference:
        with pytest.raises(ValueError, match=f"^{loss_type} reads the reference's log-probs"):
            loss(logps)
    else:
        assert loss(logps).values.isfinite().all()


@every_loss
def test_the_alignments_are_read_exactly_where_the_loss_says(loss_type, pairs, make_batch):
    empty = {"chosen_alignment": None, "rejected_alignment": None}
    logps = dataclasses.replace(make_batch([pairs["preferred"]]), **empty)
    loss = make_loss(loss_type)
    assert loss.reads_alignment == LOSS_SPECS[loss_type].reads_alignment
    if loss.reads_alignment:
        with pytest.raises(ValueError, match=f"^{loss_type} "):
            loss(logps)
    else:
        assert loss(logps).values.isfinite().all()


AT_REFERENCE = {
    **dict.fromkeys(["dpo", "dpo_norm", "robust", "dpop"], 0.6931471806),
    **dict.fromkeys(["aot", "aot_unpaired", "beta_dpo"], 0.6931471806),
    # log(1 + e^0.75)
    "odpo": 1.1368710061,
    **dict.fromkeys(["nca_pair", "bco_pair"], 1.3862943611),
    **dict.fromkeys(["hinge", "apo_zero", "apo_down"], 1.0),
    # 1/(4β²) and 1/(2β²) at β = 0.1 and 0.001
    "ipo": 25.0,
    "sppo_hard": 5_000.0,
    # −ln 2 − ½ ln(0.001 · 0.999) and ½ (1 + ln 2)
    "exo_pair": 2.7612307091,
    "discopop": 0.8465735903,
    # ln 2 times the mean of e^−0.75, e^0.0625 and e^1, the latter two capped to 1
    "wpo": 0.5712379684,
}
"""By hand, at the defaults, for the three pairs of `at_reference`."""


@every_loss
def test_the_value_at_the_reference_is_the_constant(loss_type, at_reference):
    stated = make_loss(loss_type).value_at_reference(at_reference)
    if LOSS_SPECS[loss_type].needs_reference:
        assert stated == pytest.approx(AT_REFERENCE[loss_type], rel=1e-9)
    else:
        assert stated is None


@every_variant
def test_the_value_at_the_reference_is_the_mean_there(loss_type, knobs, at_reference):
    for beta in (LOSS_SPECS[loss_type].knobs["beta"], 3.0):
        loss = make_loss(loss_type, beta=beta, **knobs)
        stated = loss.value_at_reference(at_reference)
        if stated is not None:
            assert loss(at_reference).values.mean().item() == pytest.approx(stated, rel=1e-12)


@every_variant
def test_one_value_and_two_rewards_a_pair_each_on_its_own(loss_type, knobs, pairs, make_batch):
    """A batch gives what its pairs give alone: nothing is reduced and nothing broadcast.

    A loss that compares the pairs of a batch gives the same values whatever their order; pairs that
    tie may swap theirs.
    """
    loss, rows = make_loss(loss_type, **knobs), list(pairs.values())
    if loss.needs_global_batch:
        here, there = (loss(make_batch(order)).values for order in (rows, rows[::-1]))
        torch.testing.assert_close(here.sort()[0], there.sort()[0], rtol=1e-13, atol=1e-15)
        assert not torch.equal(here, torch.cat([loss(make_batch([row])).values for row in rows]))
        return
    # A mean over the batch's tokens needs only their number, which a run knows beforehand.
    mean = sum(row.chosen_length for row in rows) / len(rows)
    alone = [loss(dataclasses.replace(make_batch([row]), mean_chosen_length=mean)) for row in rows]
    whole = loss(make_batch(rows))
    for field in dataclasses.fields(whole):
        together = getattr(whole, field.name)
        apart = torch.cat([getattr(one, field.name) for one in alone])
        assert together.shape == (len(rows),)
        # Not bit for bit: vectorised kernels round the tail of a tensor another way.
        torch.testing.assert_close(together, apart, rtol=1e-13, atol=1e-15)


@every_loss
def test_the_margin_is_read_exactly_where_the_spec_says(loss_type, pairs, make_batch):
    logps = dataclasses.replace(make_batch([pairs["preferred"]]), margin=None)
    if LOSS_SPECS[loss_type].reads_margin:
        with pytest.raises(ValueError, match=f"^{loss_type} reads margin"):
            make_loss(loss_type)(logps)
    else:
        assert make_loss(loss_type)(logps).values.isfinite().all()


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(loss_type, knobs, dtype, pairs, make_batch):
    result = make_loss(loss_type, **knobs)(make_batch([pairs["preferred"]], dtype))
    found = {getattr(result, field.name).dtype for field in dataclasses.fields(result)}
    assert found == {dtype}


@every_loss
def test_a_float64_reference_lifts_a_float32_policy(loss_type, pairs, make_batch):
    logps = make_batch([pairs["preferred"]], torch.float32)
    wide = {k: getattr(logps, k).double() for k in ("ref_chosen", "ref_rejected")}
    values = make_loss(loss_type)(dataclasses.replace(logps, **wide)).values
    reads = LOSS_SPECS[loss_type].needs_reference
    assert values.dtype == (torch.float64 if reads else torch.float32)


EXTREMES = {
    "chosen_up": (0.0, -2e4, -1e4, -1e4),
    "chosen_down": (-2e4, 0.0, -1e4, -1e4),
    "both_up": (0.0, 0.0, -1e4, -1e4),
    "both_down": (-1e4, -1e4, 0.0, 0.0),
    "equal": (-3.0, -3.0, -3.0, -3.0),
    "certain": (0.0, 0.0, 0.0, 0.0),
}


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sums", EXTREMES.values(), ids=EXTREMES)
def test_finite_at_extremes(loss_type, knobs, dtype, sums):
    """Log-ratios of ±1e4 over one token at β = 10: margins of 1e5 to 2e5, where exp overflows."""
    for beta in (10.0, LOSS_SPECS[loss_type].knobs["beta"]):
        logps = one(*sums, dtype=dtype)
        result = make_loss(loss_type, beta=beta, **knobs)(logps)
        slopes = torch.autograd.grad(result.values.sum(), [logps.chosen, logps.rejected])
        for name, value in [*vars(result).items(), *zip("wl", slopes, strict=True)]:
            assert value.isfinite().all(), (name, value)


@every_variant
def test_gradcheck(loss_type, knobs, pairs, make_batch):
    logps = make_batch([pairs["preferred"], pairs["not_preferred"], pairs["long"]], grad=True)
    # A beta at which no pair is so sure that its gradient vanishes.
    loss = make_loss(loss_type, beta=0.2, **knobs)

    def values(chosen, rejected):
        return loss(dataclasses.replace(logps, chosen=chosen, rejected=rejected)).values

    # WPO's weight without alignment depends on the policy, and is a constant to the gradient.
    if knobs == {"wpo_alignment": "none"} or loss_type == "beta_dpo":
        pytest.skip("the gradient leaves the weight, or the batch's beta, out by intent")
    assert torch.autograd.gradcheck(values, (logps.chosen, logps.rejected))


@every_loss
def test_no_gradient_reaches_the_reference(loss_type, pairs, make_batch):
    """Also where the caller forgot no_grad and the reference shares the policy's weights."""
    logps = make_batch([pairs["preferred"]], grad=True)
    refs = [x.clone().requires_grad_() for x in (logps.ref_chosen, logps.ref_rejected)]
    logps = dataclasses.replace(logps, ref_chosen=refs[0], ref_rejected=refs[1])
    values = make_loss(loss_type)(logps).values
    assert torch.autograd.grad(values.sum(), refs, allow_unused=True) == (None, None)


@every_variant
def test_rewards_are_detached_and_no_step_reads_a_value_on_the_host(
    loss_type, knobs, pairs, make_batch
):
    """A meta tensor holds no values: `.item()` or a branch on one raises."""
    logps = make_batch([pairs["preferred"], pairs["long"]], grad=True)
    held = {name: value for name, value in vars(logps).items() if value is not None}
    meta = PairLogps(**{name: value.to("meta") for name, value in held.items()})
    result = make_loss(loss_type, **knobs)(meta)
    assert result.values.shape == (2,)
    assert result.values.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.values.sum().item()


@every_name
def test_losses_are_frozen_and_equal_by_their_knobs(loss_type):
    loss = make_loss(loss_type)
    assert loss == make_loss(loss_type, beta=LOSS_SPECS[loss_type].knobs["beta"])
    assert loss != make_loss(loss_type, beta=7.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0  # type: ignore[misc]


@every_loss
@given(c=nats, r=nats, rc=nats, rr=nats, shift=nats, n=st.integers(1, 99), m=st.integers(1, 99))
def test_only_the_log_ratios_count(loss_type, c, r, rc, rr, shift, n, m):
    """Policy and reference moved together change nothing, on either side."""
    if not LOSS_SPECS[loss_type].needs_reference:
        return
    loss = make_loss(loss_type)
    here = loss(one(c, r, rc, rr, lengths=(n, m)))
    there = loss(one(c + shift, r - shift, rc + shift, rr - shift, lengths=(n, m)))
    for name, value in vars(here).items():
        torch.testing.assert_close(getattr(there, name), value, rtol=1e-7, atol=1e-7)


SCALES_WITH_BETA = {"ipo": -2, "sppo_hard": -2}
"""The power of k by which the value changes where beta is k times and log-ratios 1/k times."""
NO_SCALE = {
    "simpo": "its target is in nats",
    "orpo": "its odds are not linear in log-probs",
    "cpo": "its fine-tuning term has no beta",
    "beta_dpo": "its beta follows margins in nats",
}


@every_loss
@given(c=nats, r=nats, rc=nats, rr=nats, k=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_beta_is_the_scale_of_the_log_ratios(loss_type, c, r, rc, rr, k):
    if loss_type in NO_SCALE:
        return
    beta = LOSS_SPECS[loss_type].knobs["beta"]
    here = make_loss(loss_type, beta=beta)(one(c, r, rc, rr))
    there = make_loss(loss_type, beta=beta * k)(one(c / k, r / k, rc / k, rr / k))
    power = SCALES_WITH_BETA.get(loss_type, 0)
    torch.testing.assert_close(there.values, here.values * k**power, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(there.chosen_rewards, here.chosen_rewards, rtol=1e-9, atol=1e-9)


@every_loss
@given(c=nats, r=nats, rc=nats, rr=nats, n=st.integers(1, 99), m=st.integers(1, 99))
def test_swapping_the_answers_swaps_the_rewards(loss_type, c, r, rc, rr, n, m):
    loss = make_loss(loss_type)
    ahead, behind = loss(one(c, r, rc, rr, lengths=(n, m))), loss(one(r, c, rr, rc, lengths=(m, n)))
    assert torch.equal(ahead.chosen_rewards, behind.rejected_rewards)
    assert torch.equal(ahead.rejected_rewards, behind.chosen_rewards)


@every_loss
def test_a_larger_lead_is_worth_less_loss(loss_type):
    """From 60 nats behind to 4 ahead, both sides moving by as much; each answer has 8 tokens."""
    loss = make_loss(loss_type)
    behind, ahead = (
        loss(one(-99 + lead / 2, -99 - lead / 2, -99.0, -99.0, lengths=(8, 8))).values.item()
        for lead in (-60.0, 4.0)
    )
    assert ahead < behind


@pytest.mark.parametrize("name", ["rejected", "chosen_lengths", "ref_chosen", "chosen_alignment"])
def test_shapes_that_would_broadcast_are_refused(name, pairs, make_batch, monkeypatch):
    """One entry against two would pass for a batch of two in every formula.

    Users run without jaxtyping's checks, so they are off here.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    logps = make_batch([pairs["preferred"], pairs["long"]])
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\) where chosen has \(2,\)"):
        dataclasses.replace(logps, **{name: getattr(logps, name)[:1]})


def test_the_annotated_shapes_are_checked_here(pairs, make_batch):
    """Pytest runs these modules under jaxtyping: one axis, named pairs."""
    logps = make_batch([pairs["preferred"]])
    square = {k: v[None] for k, v in vars(logps).items() if v is not None}
    with pytest.raises(Exception, match="pairs") as caught:
        PairLogps(**square)
    assert type(caught.value).__name__ == "TypeCheckError"
