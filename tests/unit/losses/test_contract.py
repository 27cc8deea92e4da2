"""What config, the step and the checks may rely on, for every loss there is."""

import dataclasses
from typing import get_args

import jaxtyping
import pytest
import torch

from preftune.losses import LOSS_SPECS, DPOLossType, Loss, PairLogps, make_loss
from preftune.losses.spec import KNOBS

every_loss = pytest.mark.parametrize("loss_type", DPOLossType)
SMOOTHED = {"label_smoothing": 0.125}


def knobs_given(loss_type: DPOLossType) -> dict[str, object]:
    """A legal value other than the default for every knob of a loss."""
    other = {"beta": 0.75, "label_smoothing": 0.25, "gamma_beta_ratio": 1.25}
    other |= {"wpo_alignment": "none"}
    return {name: other[name] for name in LOSS_SPECS[loss_type].knobs}


@every_loss
def test_the_name_makes_the_loss_with_its_own_defaults(loss_type):
    loss = make_loss(loss_type)
    assert loss.loss_type is loss_type
    assert dataclasses.asdict(loss) == dict(LOSS_SPECS[loss_type].knobs)


@every_loss
def test_every_knob_given_arrives(loss_type):
    given = knobs_given(loss_type)
    assert dataclasses.asdict(make_loss(loss_type, **given)) == given


@every_loss
def test_every_knob_moves_the_value(loss_type, pairs, make_batch):
    """No knob is accepted and ignored."""
    logps = make_batch([pairs["preferred"]])
    plain = make_loss(loss_type)(logps).values.item()
    for name, value in knobs_given(loss_type).items():
        moved = make_loss(loss_type, **{name: value})(logps).values.item()
        assert abs(moved - plain) > 1e-4, name


def test_the_union_names_every_loss_once():
    assert [cls.loss_type for cls in get_args(Loss)] == list(DPOLossType)


@every_loss
def test_knobs_of_others_and_unknown_ones_are_refused(loss_type):
    for name in KNOBS.keys() - LOSS_SPECS[loss_type].knobs.keys():
        with pytest.raises(ValueError, match=f"{name} is a knob of .*; {loss_type} would ignore"):
            make_loss(loss_type, **{name: KNOBS[name].default})
    with pytest.raises(ValueError, match=r"bta is no knob of a loss; did you mean beta\?"):
        make_loss(loss_type, bta=0.1)


@every_loss
def test_knobs_out_of_range_are_refused_all_at_once(loss_type):
    with pytest.raises(ValueError) as caught:
        make_loss(loss_type, beta=0.0, label_smoothing=0.5)
    assert str(caught.value) == (
        f"{loss_type}: beta is 0.0; it must be a finite number above 0; "
        "label_smoothing is 0.5; it must be a finite number at least 0 and below 0.5"
    )


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


@every_loss
@pytest.mark.parametrize("knobs", [{}, SMOOTHED, {"beta": 3.0}], ids=["default", "eps", "beta"])
def test_the_value_at_the_reference_is_the_mean_there(loss_type, knobs, at_reference):
    loss = make_loss(loss_type, **knobs)
    stated = loss.value_at_reference(at_reference)
    if stated is None:
        assert not LOSS_SPECS[loss_type].needs_reference
    else:
        assert loss(at_reference).values.mean().item() == pytest.approx(stated, rel=1e-12)


@every_loss
def test_one_value_and_two_rewards_a_pair_each_on_its_own(loss_type, pairs, make_batch):
    """A batch gives what its pairs give alone: nothing is reduced and nothing broadcast."""
    loss, rows = make_loss(loss_type, **SMOOTHED), list(pairs.values())
    whole, alone = loss(make_batch(rows)), [loss(make_batch([row])) for row in rows]
    for field in dataclasses.fields(whole):
        together = getattr(whole, field.name)
        apart = torch.cat([getattr(one, field.name) for one in alone])
        assert together.shape == (len(rows),)
        # Not bit for bit: vectorised kernels round the tail of a tensor another way.
        torch.testing.assert_close(together, apart, rtol=1e-14, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(loss_type, dtype, pairs, make_batch):
    result = make_loss(loss_type, **SMOOTHED)(make_batch([pairs["preferred"]], dtype))
    found = {getattr(result, field.name).dtype for field in dataclasses.fields(result)}
    assert found == {dtype}


@every_loss
def test_a_float64_reference_lifts_a_float32_policy(loss_type, pairs, make_batch):
    logps = make_batch([pairs["preferred"]], torch.float32)
    wide = {k: getattr(logps, k).double() for k in ("ref_chosen", "ref_rejected")}
    values = make_loss(loss_type)(dataclasses.replace(logps, **wide)).values
    reads = LOSS_SPECS[loss_type].needs_reference
    assert values.dtype == (torch.float64 if reads else torch.float32)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_finite_at_extreme_margins(loss_type, dtype, eps, margin):
    """h = ±1e4 over one token at β = 10: z = ±1e5, where exp overflows in every dtype."""
    chosen, rejected = (0.0, -margin) if margin > 0 else (margin, 0.0)
    sums = [torch.tensor([x], dtype=dtype, requires_grad=True) for x in (chosen, rejected)]
    one, zero = torch.tensor([1]), torch.zeros(1, dtype=dtype)
    logps = PairLogps(*sums, one, one, zero, zero, zero, zero)
    loss = make_loss(loss_type, beta=10.0, label_smoothing=eps)
    result = loss(logps)
    slopes = torch.autograd.grad(result.values.sum(), sums)
    wrong = 1 - eps if margin < 0 else eps
    assert result.values.item() == pytest.approx(wrong * 1e5, rel=1e-2, abs=1e-6)
    for slope, sign in zip(slopes, (1, -1), strict=True):
        expected = 10 * (eps if margin > 0 else -(1 - eps)) * sign
        assert slope.item() == pytest.approx(expected, rel=1e-2, abs=1e-6)


@every_loss
def test_overflow_of_fp16_is_no_nan_where_the_answer_is_right(loss_type):
    """β h = 1e5 is inf in fp16: without smoothing the value is 0, not 0 + 0·inf."""
    sums = [torch.tensor([x], dtype=torch.float16) for x in (0.0, -1e4)]
    one, zero = torch.tensor([1]), torch.zeros(1, dtype=torch.float16)
    loss = make_loss(loss_type, beta=10.0)
    assert loss(PairLogps(*sums, one, one, zero, zero, zero, zero)).values.item() == 0


@every_loss
@pytest.mark.parametrize("eps", [0.0, 0.25])
def test_gradcheck(loss_type, eps, pairs, make_batch):
    logps = make_batch([pairs["preferred"], pairs["not_preferred"], pairs["long"]], grad=True)
    # A beta at which no pair is so sure that its gradient vanishes.
    loss = make_loss(loss_type, beta=0.2, label_smoothing=eps)

    def values(chosen, rejected):
        return loss(dataclasses.replace(logps, chosen=chosen, rejected=rejected)).values

    assert torch.autograd.gradcheck(values, (logps.chosen, logps.rejected))


@every_loss
def test_no_gradient_reaches_the_reference(loss_type, pairs, make_batch):
    """Also where the caller forgot no_grad and the reference shares the policy's weights."""
    logps = make_batch([pairs["preferred"]], grad=True)
    refs = [x.clone().requires_grad_() for x in (logps.ref_chosen, logps.ref_rejected)]
    logps = dataclasses.replace(logps, ref_chosen=refs[0], ref_rejected=refs[1])
    values = make_loss(loss_type)(logps).values
    assert torch.autograd.grad(values.sum(), refs, allow_unused=True) == (None, None)


@every_loss
def test_no_step_reads_a_value_on_the_host(loss_type, pairs, make_batch):
    """A meta tensor holds no values: `.item()` or a branch on one raises."""
    logps = make_batch([pairs["preferred"], pairs["long"]])
    meta = PairLogps(**{name: value.to("meta") for name, value in vars(logps).items()})
    result = make_loss(loss_type, **SMOOTHED)(meta)
    assert result.values.shape == (2,)
    with pytest.raises((RuntimeError, NotImplementedError)):
        result.values.sum().item()


@every_loss
def test_losses_are_frozen_and_equal_by_their_knobs(loss_type):
    loss = make_loss(loss_type)
    assert loss == make_loss(loss_type, beta=LOSS_SPECS[loss_type].knobs["beta"])
    assert loss != make_loss(loss_type, beta=7.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 1.0  # type: ignore[misc]


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
    square = {name: value[None] for name, value in vars(logps).items()}
    with pytest.raises(Exception, match="pairs") as caught:
        PairLogps(**square)
    assert type(caught.value).__name__ == "TypeCheckError"
