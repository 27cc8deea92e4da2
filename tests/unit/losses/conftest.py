"""Builders of pairs and completions, and the comparison every loss's oracle goes through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mpmath
import pytest
import torch
from hypothesis import settings

from preftune.losses import CompletionLogps, Loss, PairLogps, UnpairedLoss

# A machine with other work on it takes seconds where milliseconds are due.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@dataclass(frozen=True)
class Pair:
    """One pair in plain numbers: log-prob sums in nats, lengths in tokens."""

    chosen: float
    rejected: float
    ref_chosen: float
    ref_rejected: float
    chosen_length: int = 4
    rejected_length: int = 2
    chosen_alignment: float = -0.5
    rejected_alignment: float = -0.25
    margin: float = 0.75
    prompt: float = -7.0
    prompt_length: int = 3


PAIRS = {
    # h = (-10 + 12) - (-9 + 8) = 3; per token 2/4 - (-1)/2 = 1
    "preferred": Pair(-10.0, -9.0, -12.0, -8.0),
    # h = (-10 + 7.5) - (-6 + 8.25) = -4.75
    "not_preferred": Pair(-10.0, -6.0, -7.5, -8.25),
    "at_reference": Pair(-10.0, -6.0, -10.0, -6.0),
    "large": Pair(-20.0, -5000.0, -5020.0, -10.0),
    "large_negative": Pair(-5000.0, -20.0, -10.0, -5020.0),
    "long": Pair(-700.25, -3.5, -710.75, -2.25, 512, 1, 0.125, -0.0625),
    "weight_capped": Pair(-10.0, -9.0, -12.0, -8.0, 3, 7, 0.75, 0.25),
}


def batch(pairs: list[Pair], dtype: torch.dtype = torch.float64, grad: bool = False) -> PairLogps:
    def floats(name: str, requires_grad: bool = False) -> torch.Tensor:
        values = [getattr(pair, name) for pair in pairs]
        return torch.tensor(values, dtype=dtype, requires_grad=requires_grad)

    return PairLogps(
        chosen=floats("chosen", grad),
        rejected=floats("rejected", grad),
        chosen_lengths=torch.tensor([pair.chosen_length for pair in pairs]),
        rejected_lengths=torch.tensor([pair.rejected_length for pair in pairs]),
        ref_chosen=floats("ref_chosen"),
        ref_rejected=floats("ref_rejected"),
        chosen_alignment=floats("chosen_alignment"),
        rejected_alignment=floats("rejected_alignment"),
        margin=floats("margin"),
        prompt=floats("prompt"),
        prompt_lengths=torch.tensor([pair.prompt_length for pair in pairs]),
    )


@dataclass(frozen=True)
class Completion:
    """One labelled completion in plain numbers: log-prob sums in nats, its length in tokens."""

    policy: float
    reference: float
    is_desirable: bool
    mismatched: float = -30.0
    mismatched_reference: float = -30.0
    length: int = 4

    @property
    def logratio(self) -> float:
        return self.policy - self.reference

    @property
    def mismatched_logratio(self) -> float:
        return self.mismatched - self.mismatched_reference


# Log-ratios and, behind them, mismatched ones.
COMPLETIONS = {
    "desirable": Completion(-10.0, -12.0, True, -20.0, -21.5),  # 2; 1.5
    "undesirable": Completion(-9.0, -6.0, False, -25.5, -25.0),  # -3; -0.5
    "desirable_down": Completion(-10.0, -7.25, True, -30.0, -27.75),  # -2.75; -2.25
    "undesirable_up": Completion(-6.0, -7.5, False, -12.0, -15.0),  # 1.5; 3
    "desirable_far": Completion(-20.0, -5020.0, True, -20.0, -50.0),  # 5000; 30
    "undesirable_far": Completion(-20.0, -5020.0, False, -80.0, -50.0),  # 5000; -30
    "long": Completion(-700.25, -710.75, True, -900.5, -899.0, 512),  # 10.5; -1.5
}
BATCHES = {
    "first": ("desirable", "undesirable"),  # the mismatched mean is 0.5
    "one_desirable": ("desirable",),
    "one_undesirable": ("undesirable",),  # -0.5
    "one_label": ("desirable", "desirable_down", "long"),  # -0.75
    "other_label": ("undesirable", "undesirable_up"),  # 1.25
    "mixed": ("desirable", "undesirable_up", "desirable_down", "undesirable", "long"),
    "far": tuple(COMPLETIONS),
}


def completion_batch(
    rows: Sequence[Completion], dtype: torch.dtype = torch.float64, grad: bool = False
) -> CompletionLogps:
    def floats(name: str, requires_grad: bool = False) -> torch.Tensor:
        values = [getattr(row, name) for row in rows]
        return torch.tensor(values, dtype=dtype, requires_grad=requires_grad)

    return CompletionLogps(
        policy=floats("policy", grad),
        lengths=torch.tensor([row.length for row in rows]),
        is_desirable=torch.tensor([row.is_desirable for row in rows]),
        reference=floats("reference"),
        mismatched=floats("mismatched"),
        mismatched_reference=floats("mismatched_reference"),
    )


Formula = Callable[..., mpmath.mpf]


def assert_is_formula(loss: Loss, pair: Pair, formula: Formula) -> None:
    """The loss and both its partial derivatives are those of a scalar formula, to 1e-9.

    Args:
        loss: under test, run in float64.
        pair: the one pair.
        formula: of the policy's two sums; differentiated numerically with 50 digits, so that what
            is constant to the gradient must be constant in it too.
    """
    logps = batch([pair], grad=True)
    value = loss(logps).values
    got = torch.autograd.grad(value.sum(), [logps.chosen, logps.rejected])
    with mpmath.workdps(50):
        at = (mpmath.mpf(pair.chosen), mpmath.mpf(pair.rejected))
        expected = float(formula(*at))
        slopes = [float(mpmath.diff(formula, at, order)) for order in ((1, 0), (0, 1))]
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert [g.item() for g in got] == pytest.approx(slopes, rel=1e-9, abs=1e-9)


def assert_each_is_formula(
    loss: UnpairedLoss, logps: CompletionLogps, formulas: Sequence[Formula]
) -> None:
    """The loss of each completion and its derivative are those of a scalar formula, to 1e-9.

    Args:
        loss: under test.
        logps: of the batch, in float64.
        formulas: of the policy's sum, one for each completion; what the loss takes of the whole
            batch is a constant in it, as it must be to the gradient.
    """
    logps = replace(logps, policy=logps.policy.detach().requires_grad_())
    values = loss(logps).values
    (got,) = torch.autograd.grad(values.sum(), logps.policy)
    with mpmath.workdps(50):
        at = [mpmath.mpf(x) for x in logps.policy.tolist()]
        each = list(zip(formulas, at, strict=True))
        expected = [float(formula(x)) for formula, x in each]
        slopes = [float(mpmath.diff(formula, x)) for formula, x in each]
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert got.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-9)


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., PairLogps]:
    return batch


@pytest.fixture(scope="session")
def check_formula() -> Callable[[Loss, Pair, Formula], None]:
    return assert_is_formula


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    return PAIRS


@pytest.fixture(scope="session")
def at_reference() -> PairLogps:
    """Three unlike pairs whose policy equals the reference."""
    chosen = ["preferred", "long", "weight_capped"]
    three = [
        replace(PAIRS[n], ref_chosen=PAIRS[n].chosen, ref_rejected=PAIRS[n].rejected)
        for n in chosen
    ]
    return batch(three)


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def rows(request: pytest.FixtureRequest) -> list[Completion]:
    """A batch of labelled completions."""
    return [COMPLETIONS[name] for name in request.param]


@pytest.fixture(scope="session")
def completions() -> dict[str, Completion]:
    return COMPLETIONS


@pytest.fixture(scope="session")
def make_completions() -> Callable[..., CompletionLogps]:
    return completion_batch


@pytest.fixture(scope="session")
def check_each() -> Callable[[UnpairedLoss, CompletionLogps, Sequence[Formula]], None]:
    return assert_each_is_formula


@pytest.fixture(scope="session")
def completions_at_reference() -> CompletionLogps:
    """Two desirable completions and an undesirable one; policy equals reference."""
    three = [
        replace(row, reference=row.policy, mismatched_reference=row.mismatched)
        for row in (COMPLETIONS[n] for n in ("desirable", "undesirable", "long"))
    ]
    return completion_batch(three)
