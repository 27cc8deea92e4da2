"""Builders of pairs, and the one comparison every loss's oracle goes through."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mpmath
import pytest
import torch
from hypothesis import settings

from preftune.losses import Loss, PairLogps

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
