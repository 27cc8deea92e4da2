"""Every loss that TRL has, too, trained 20 steps by both tools from a policy that is not its
reference: the same loss and the same gradient norm at each step.

Each side goes its own way from options and pairs to the update: TRL through its trainers, preftune
through its forward, loss, step and optimizer.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest

from preftune.distributed.runtime import Runtime
from tests.peers import preftune_side
from tests.peers.cases import CASES, LACKING, Case
from tests.peers.materials import STEPS, Materials, Trace, labelled, materials
from tests.peers.preftune_side import config_of

RELATIVE, ABSOLUTE = 1e-4, 1e-5

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install '.[peers]'"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def trl_side() -> Any:
    """TRL, which warns when it is imported, and as it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.peers import trl_side

        return trl_side


@pytest.fixture(scope="module")
def start() -> Callable[[Case], Materials]:
    """What a case is trained on."""
    usual = materials()
    single = labelled(usual)

    def of(case: Case) -> Materials:
        return single if case.trainer == "KTO" else usual

    return of


@pytest.fixture(scope="module")
def trl_trained(trl_side, start, tmp_path_factory) -> Callable[[Case], Trace]:
    """TRL's training of a case, once for all tests."""
    known: dict[str, Trace] = {}

    def train(case: Case) -> Trace:
        if case.name not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                known[case.name] = trl_side.train(case, start(case), tmp_path_factory.mktemp("trl"))
        return known[case.name]

    return train


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> Callable[..., Trace]:
    """preftune's training of a case, with changed options or parts."""
    folder = tmp_path_factory.mktemp("reference")

    def train(case: Case, make_runtime: Any = Runtime, **changes: Any) -> Trace:
        return preftune_side.train(config_of(case, **changes), start(case), folder, make_runtime)

    return train


def differences(ours: Trace, theirs: Trace) -> list[str]:
    """Where two trainings differ by more than rounding."""
    for trace in (ours, theirs):
        assert len(trace.losses) == len(trace.grad_norms) == STEPS
    return [
        f"{what} of step {step}: preftune {a:.9g}, TRL {b:.9g}"
        for what in ("losses", "grad_norms")
        for step, (a, b) in enumerate(
            zip(getattr(ours, what), getattr(theirs, what), strict=True), start=1
        )
        if not abs(a - b) <= ABSOLUTE + RELATIVE * abs(b)
    ]


def largest(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of a step."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@each_case
def test_loss_and_gradient_norm_equal_trls_at_each_step(case, trained, trl_trained):
    ours, theirs = trained(case), trl_trained(case)
    loss, norm = (largest(getattr(ours, w), getattr(theirs, w)) for w in ("losses", "grad_norms"))
    print(f"| {case.name} | {loss:.1e} | {norm:.1e} |")  # the table of docs/peers.md: pytest -s
    assert differences(ours, theirs) == []


@each_case
def test_a_beta_off_by_one_percent_is_seen(case, trained, trl_trained):
    beta = config_of(case).beta
    assert beta is not None
    assert differences(trained(case, beta=1.01 * beta), trl_trained(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.form], ids=lambda case: case.name)
def test_trls_form_is_another_than_the_papers(case, trained, trl_trained):
    assert differences(trained(replace(case, form={})), trl_trained(case))


class TwiceTheGradient(Runtime):
    """Mutant: the loss is right, its gradient twice what it should be."""

    def spread(self, *args, **options):
        engine = super().spread(*args, **options)
        backward = engine.backward
        engine.backward = lambda loss: backward(2 * loss)
        return engine


def test_a_gradient_twice_as_large_is_seen(trained, trl_trained):
    right, mutant = trained(CASES[0]), trained(CASES[0], make_runtime=TwiceTheGradient)
    assert mutant.losses[0] == right.losses[0]
    assert differences(mutant, trl_trained(CASES[0]))


def test_the_policy_is_not_its_reference(trained):
    (dpo,) = (case for case in CASES if case.name == "dpo")
    assert abs(trained(dpo).losses[0] - math.log(2)) > 1e-2


@pytest.mark.parametrize("change", [{"reference_sync_steps": 7}, {"reference_mixup_alpha": 0.31}])
def test_a_reference_that_follows_otherwise_is_seen(change, trained, trl_trained):
    (case,) = (case for case in CASES if "sync_reference" in case.ours)
    assert differences(trained(case, **change), trl_trained(case))


def test_the_kl_estimate_of_kto_is_above_0_in_most_steps_and_held_at_it_in_others(trained):
    (kto,) = (case for case in CASES if case.name == "kto")
    baselines = trained(kto).baselines
    assert sum(baseline > 0.1 for baseline in baselines) > STEPS / 2
    assert 0.0 in baselines


def test_every_loss_of_trl_is_compared_or_known_to_be_lacking(trl_side):
    compared = {loss for case in CASES for loss in case.their_losses}
    assert compared.isdisjoint(LACKING)
    assert compared | set(LACKING) == trl_side.loss_types()
    asked = {case.theirs.get("f_divergence_type", "reverse_kl") for case in CASES}
    assert asked == trl_side.divergences()
