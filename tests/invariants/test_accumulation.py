"""The gradient does not depend on how a global batch is cut; mistakes in that are seen.

21 pairs of very different lengths make batches of 8, 8, 5 (or 9, 9, 3), so a short last batch is
part of every comparison. The start is a perturbed policy: see `harness.short_training`.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from preftune.distributed.runtime import Runtime
from preftune.objective import PairObjective
from tests.invariants.harness import Trace, short_training

CASES = [((8, 1), (2, 4)), ((8, 1), (1, 8)), ((9, 1), (3, 3))]
SETUPS = {"sgd": 0.5, "adamw": 1e-5}


@cache
def _cache_dir() -> Path:
    return Path(mkdtemp(prefix="preftune-harness-"))


def run(shape: tuple[int, int], optimizer: str, **options) -> Trace:
    micro_batch, accumulation = shape
    return short_training(
        _cache_dir(),
        micro_batch=micro_batch,
        accumulation=accumulation,
        optimizer=optimizer,
        learning_rate=SETUPS[optimizer],
        **options,
    )


def assert_same(one: Trace, other: Trace, optimizer: str) -> None:
    assert other.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    if optimizer == "sgd":
        assert one.moved > 1e-2
        assert float((one.weights - other.weights).abs().max()) <= 1e-6
    else:
        assert other.losses == pytest.approx(one.losses, abs=1e-5, rel=0)


@pytest.mark.parametrize("optimizer", SETUPS)
@pytest.mark.parametrize(("whole", "cut"), CASES)
def test_accumulation_changes_nothing(whole, cut, optimizer):
    assert_same(run(whole, optimizer), run(cut, optimizer), optimizer)


@pytest.mark.parametrize("loss_type", ["dpo_norm", "simpo", "wpo"])
def test_accumulation_changes_nothing_for_other_losses(loss_type):
    whole, cut = (run(s, "adamw", loss_type=loss_type) for s in ((8, 1), (2, 4)))
    assert_same(whole, cut, "adamw")


# Far enough from the reference for the batch to stand in another order (aot).
FAR = 0.1


@pytest.mark.parametrize(
    ("loss_type", "optimizer"),
    # beta_dpo under large steps of SGD leaves any two runs apart: its beta follows the margins.
    [("aot", "sgd"), ("aot", "adamw"), ("aot_unpaired", "sgd"), ("beta_dpo", "adamw")],
)
def test_losses_of_the_global_batch_see_all_of_it(loss_type, optimizer):
    options = {"loss_type": loss_type, "perturbation": FAR}
    whole, *others = (run(s, optimizer, **options) for s in ((8, 1), (2, 4), (1, 8), (3, 2)))
    for cut in others[:2]:
        assert_same(whole, cut, optimizer)
    with pytest.raises(AssertionError):  # batches of 6: another batch, another loss
        assert_same(whole, others[2], optimizer)


class MicroBatchAlone(PairObjective):
    """Mutant: a loss of the global batch is shown one micro-batch at a time, as TRL does."""

    def __call__(self, model, micro_batch, *, batch=None, running=None):
        return super().__call__(model, micro_batch, running=running)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "beta_dpo"])
def test_a_loss_that_sees_only_its_micro_batch_is_noticed(loss_type):
    options = {"loss_type": loss_type, "perturbation": FAR}
    whole = run((8, 1), "adamw", **options)
    alone = run((2, 4), "adamw", make_objective=MicroBatchAlone, **options)
    with pytest.raises(AssertionError):
        assert_same(whole, alone, "adamw")


class MeanOfMicroBatches(PairObjective):
    """Mutant: every micro-batch counts the same, however few pairs it holds."""

    def __call__(self, model, micro_batch, **seen):
        output = super().__call__(model, micro_batch, **seen)
        # The global batch has 4 micro-batches of 2, the last one of the short batch a single pair.
        scale = 2 / micro_batch.num_rows
        return replace(output, loss_sum=output.loss_sum * scale)


class TokenWeighted(PairObjective):
    """Mutant: a micro-batch counts by its tokens."""

    def __call__(self, model, micro_batch, **seen):
        output = super().__call__(model, micro_batch, **seen)
        scale = micro_batch.layout.num_tokens / (200 * micro_batch.num_rows)
        return replace(output, loss_sum=output.loss_sum * scale)


class TimesAccumulation(Runtime):
    """Mutant: gradients are summed over micro-batches where their share was meant."""

    def spread(self, *args, **options):
        engine = super().spread(*args, **options)
        backward = engine.backward
        engine.backward = lambda loss: backward(loss * 4)
        return engine


MUTANTS = {
    "micro-batch mean": {"make_objective": MeanOfMicroBatches},
    "token-weighted": {"make_objective": TokenWeighted},
    "gradient x accumulation": {"make_runtime": TimesAccumulation},
}


@pytest.mark.parametrize("optimizer", SETUPS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees_each_mistake(mutant, optimizer):
    right = run((8, 1), optimizer)
    with pytest.raises(AssertionError):
        assert_same(right, run((2, 4), optimizer, **MUTANTS[mutant]), optimizer)
