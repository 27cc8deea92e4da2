"""What the step and the checks may rely on, for every loss on single labelled completions."""

from dataclasses import fields, replace

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.losses import LOSS_SPECS, CompletionLogps, make_loss
from tests.loss_knobs import UNPAIRED, other_value

every_loss = pytest.mark.parametrize("loss_type", UNPAIRED)
# With a knob of each loss away from its default, and batches before this one.
KNOBS_GIVEN = {"kto": {"desirable_weight": 1.5, "undesirable_weight": 0.25}, "bco": {}}
batches = st.lists(
    st.tuples(*[st.floats(-500, 0, allow_subnormal=False)] * 4, st.booleans()),
    min_size=1,
    max_size=5,
)


def of(batch, running=(0.5, -0.25)) -> CompletionLogps:
    """From rows of policy, reference, mismatched, its reference, and label."""
    *sums, labels = zip(*batch, strict=True)
    policy, reference, mismatched, mismatched_reference = (
        torch.tensor(column, dtype=torch.float64) for column in sums
    )
    return CompletionLogps(
        policy=policy,
        lengths=torch.full(policy.shape, 3),
        is_desirable=torch.tensor(labels),
        reference=reference,
        mismatched=mismatched,
        mismatched_reference=mismatched_reference,
        running=torch.tensor(running, dtype=torch.float64),
    )


def close(here, there, scale=1.0):
    for field in fields(here):
        expected = getattr(here, field.name) * scale
        torch.testing.assert_close(getattr(there, field.name), expected, rtol=1e-7, atol=1e-7)


@pytest.fixture
def mixed(completions, make_completions):
    """Both labels, ahead and behind, and a mismatched mean above 0."""
    names = ("desirable", "undesirable_up", "desirable_down", "undesirable")
    return make_completions([completions[name] for name in names])


@every_loss
def test_every_knob_moves_the_value(loss_type, mixed):
    plain = make_loss(loss_type)(mixed).values
    for name in LOSS_SPECS[loss_type].knobs:
        moved = make_loss(loss_type, **{name: other_value(loss_type, name)})(mixed)
        assert (moved.values - plain).abs().max() > 1e-4, name


@every_loss
@pytest.mark.parametrize("missing", ["reference", "mismatched", "mismatched_reference"])
def test_what_is_read_is_what_the_spec_says(loss_type, missing, mixed):
    logps, spec = replace(mixed, **{missing: None}), LOSS_SPECS[loss_type]
    if missing == "reference" or spec.reads_mismatched:
        with pytest.raises(ValueError, match=rf"^{loss_type} reads .* {missing}.* None; score "):
            make_loss(loss_type)(logps)
    else:
        assert make_loss(loss_type)(logps).values.isfinite().all()


@every_loss
def test_the_spec_asks_for_a_reference_and_the_global_batch(loss_type):
    loss, spec = make_loss(loss_type), LOSS_SPECS[loss_type]
    assert spec.needs_reference
    assert loss.needs_global_batch
    assert not loss.reads_alignment
    assert not spec.reads_margin


AT_REFERENCE = {"kto": 0.5, "bco": 0.6931471806}
"""By hand, at the defaults: λ/2 of every completion, and ln 2."""


@every_loss
def test_the_value_at_the_reference_is_the_mean_there(loss_type, completions_at_reference):
    stated = make_loss(loss_type).value_at_reference(completions_at_reference)
    assert stated == pytest.approx(AT_REFERENCE[loss_type], rel=1e-9)
    for beta in (0.1, 3.0):
        loss = make_loss(loss_type, beta=beta, **KNOBS_GIVEN[loss_type])
        stated = loss.value_at_reference(completions_at_reference)
        got = loss(completions_at_reference).values.mean().item()
        assert got == pytest.approx(stated, rel=1e-12)


@every_loss
def test_the_order_of_a_batch_does_not_matter_and_its_rest_does(loss_type, mixed):
    loss = make_loss(loss_type)
    back = {k: v.flip(0) for k, v in vars(mixed).items() if v is not None}
    here, there = loss(mixed), loss(CompletionLogps(**back))
    torch.testing.assert_close(here.values, there.values.flip(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(here.rewards, there.rewards.flip(0), rtol=1e-13, atol=1e-15)
    first = {k: v[:1] for k, v in vars(mixed).items() if v is not None}
    assert here.values.shape == (4,)
    assert here.baseline.shape == ()
    assert abs(loss(CompletionLogps(**first)).values[0] - here.values[0]) > 1e-5


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(loss_type, dtype, completions, make_completions):
    loss = make_loss(loss_type)
    logps = make_completions([completions["desirable"], completions["undesirable"]], dtype)
    assert {value.dtype for value in vars(loss(logps)).values()} == {dtype}
    # A run keeps what was running in its own dtype.
    kept = loss.next_running(logps)
    again = replace(logps, running=None if kept is None else kept.float())
    assert loss(again).values.dtype == dtype


@every_loss
def test_a_float64_reference_lifts_a_float32_policy(loss_type, completions, make_completions):
    logps = make_completions([completions["desirable"]], torch.float32)
    names = ("reference", "mismatched_reference")
    wide = replace(logps, **{name: getattr(logps, name).double() for name in names})
    assert make_loss(loss_type)(wide).values.dtype == torch.float64


EXTREMES = {
    "up": (0.0, -1e4, 0.0, 0.0),
    "down": (-1e4, 0.0, 0.0, 0.0),
    "baseline_up": (-3.0, -3.0, 0.0, -1e4),
    "baseline_down": (-3.0, -3.0, -1e4, 0.0),
    "certain": (0.0, 0.0, 0.0, 0.0),
}


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sums", EXTREMES.values(), ids=EXTREMES)
def test_finite_at_extremes(loss_type, dtype, sums, completions, make_completions):
    """Log-ratios of ±1e4 over one token at β = 10, both labels, and one of them alone."""
    names = ("policy", "reference", "mismatched", "mismatched_reference")
    row = replace(completions["desirable"], length=1, **dict(zip(names, sums, strict=True)))
    both = [row, replace(row, is_desirable=False)]
    for rows in (both, both[:1], both[1:]):
        for beta in (10.0, 0.1):
            logps = make_completions(rows, dtype, grad=True)
            loss = make_loss(loss_type, beta=beta)
            result, running = loss(logps), loss.next_running(logps)
            (slopes,) = torch.autograd.grad(result.values.sum(), logps.policy)
            for value in (*vars(result).values(), slopes, running):
                assert value is None or value.isfinite().all()


@every_loss
def test_gradcheck(loss_type, mixed, monkeypatch):
    """BCO's shift is a constant to the gradient, so it is held here; KTO's has no policy in it."""
    loss = make_loss(loss_type, beta=0.2, **KNOBS_GIVEN[loss_type])
    kept = loss.next_running(mixed)
    monkeypatch.setattr(type(loss), "next_running", lambda *_: kept)
    policy = mixed.policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(replace(mixed, policy=x)).values, policy)


@every_loss
def test_no_gradient_reaches_anything_but_the_policys_own_sums(loss_type, mixed):
    """Also where the caller forgot no_grad: neither the reference nor the mismatched side."""
    names = ("reference", "mismatched", "mismatched_reference")
    others = {name: getattr(mixed, name).clone().requires_grad_() for name in names}
    running = torch.tensor([0.5, -0.25], dtype=torch.float64)
    policy = mixed.policy.clone().requires_grad_()
    values = make_loss(loss_type)(replace(mixed, policy=policy, running=running, **others)).values
    got = torch.autograd.grad(values.sum(), [policy, *others.values()], allow_unused=True)
    assert (got[0] != 0).all()
    assert got[1:] == (None, None, None)


@every_loss
def test_the_gradient_of_a_completion_is_its_own(loss_type, mixed):
    """Nothing flows through the baseline to the rest of the batch."""
    policy = mixed.policy.clone().requires_grad_()
    values = make_loss(loss_type)(replace(mixed, policy=policy)).values
    for n, value in enumerate(values):
        (slopes,) = torch.autograd.grad(value, policy, retain_graph=True)
        assert slopes.nonzero().flatten().tolist() == [n]
        # Desirable completions are pulled up, undesirable ones pushed down.
        assert (slopes[n] < 0) == mixed.is_desirable[n]


@every_loss
@pytest.mark.parametrize("running", [None, (0.5, -0.25)], ids=["first", "later"])
def test_rewards_are_detached_and_no_step_reads_a_value_on_the_host(loss_type, running, mixed):
    """A meta tensor holds no values: `.item()` or a branch on one raises."""
    mixed = replace(mixed, running=None if running is None else torch.tensor(running))
    meta = {name: value.to("meta") for name, value in vars(mixed).items() if value is not None}
    logps = CompletionLogps(**meta | {"policy": meta["policy"].requires_grad_()})
    loss = make_loss(loss_type)
    result, kept = loss(logps), loss.next_running(logps)
    assert result.values.shape == (4,)
    assert result.values.requires_grad
    assert not result.rewards.requires_grad
    assert not result.baseline.requires_grad
    assert kept is None or not kept.requires_grad
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.values.sum().item()


@every_loss
@given(batch=batches, shift=st.floats(-500, 0, allow_subnormal=False))
def test_only_the_log_ratios_count(loss_type, batch, shift):
    """Policy and reference moved together change nothing, of own and mismatched completions."""
    moved = [(p + shift, r + shift, m - shift, n - shift, y) for p, r, m, n, y in batch]
    loss = make_loss(loss_type)
    close(loss(of(batch)), loss(of(moved)))


@every_loss
@given(batch=batches, k=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_beta_is_the_scale_of_the_log_ratios(loss_type, batch, k):
    scaled = [(*(x / k for x in row[:4]), row[4]) for row in batch]
    here, there = make_loss(loss_type, beta=0.1), make_loss(loss_type, beta=0.1 * k)
    close(here(of(batch)), there(of(scaled)))


@every_loss
@given(batch=batches)
def test_swapped_labels_are_the_mirror_around_baseline_0(loss_type, batch):
    """Each side of policy and reference swapped, labels and their weights too: the same values.

    The mismatched log-ratios are 0, so that kto's baseline is; bco's changes its sign.
    """
    level = [(p, r, m, m, y) for p, r, m, _, y in batch]
    mirror = [(r, p, m, m, not y) for p, r, m, _, y in batch]
    weights = KNOBS_GIVEN[loss_type]
    swapped = dict(zip(weights, reversed(weights.values()), strict=True))
    here = make_loss(loss_type, **weights)(of(level))
    there = make_loss(loss_type, **swapped)(of(mirror, running=(0.25, -0.5)))
    torch.testing.assert_close(there.values, here.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(there.rewards, -here.rewards, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(there.baseline, -here.baseline, rtol=1e-9, atol=1e-9)


@every_loss
@given(batch=batches, lead=st.floats(0.5, 20))
def test_values_fall_as_completions_go_the_way_of_their_labels(loss_type, batch, lead):
    level = [(-50.0, -50.0, m, n, y) for _, _, m, n, y in batch]
    moved = [(p + (lead if y else -lead), r, m, n, y) for p, r, m, n, y in level]
    loss = make_loss(loss_type)
    # A baseline 500 nats away leaves nothing to fall.
    here, there = loss(of(level)).values, loss(of(moved)).values
    assert (there <= here).all()


@pytest.mark.parametrize("name", ["lengths", "is_desirable", "reference", "mismatched"])
def test_shapes_that_would_broadcast_are_refused(name, mixed, monkeypatch):
    """Users run without jaxtyping's checks, so they are off here."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rf"{name} has shape \(1,\) where policy has \(4,\)"):
        replace(mixed, **{name: getattr(mixed, name)[:1]})


def test_what_is_running_has_its_own_shape(mixed):
    assert replace(mixed, running=torch.zeros(2)).running is not None
