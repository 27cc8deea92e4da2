"""The check before the first step sees what the loss alone does not."""

import pytest
import torch

from preftune.batching.batcher import RowBatcher
from preftune.batching.layout import Layout
from preftune.errors import CacheError
from preftune.losses import LOSS_SPECS, DPOLossType, make_loss
from preftune.model.forward import PolicyModel
from preftune.objective import PairObjective
from preftune.recipes.step_zero import check_step_zero
from preftune.reference.build import reference_logps
from preftune.reference.store import ReferenceStore
from tests.examples import make_examples
from tests.loss_knobs import ON_PAIRS
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def check(tmp_path, loss_type="dpo", change=None, model=None):
    examples = make_examples(4)
    policy = PolicyModel(tiny_model())
    store = ReferenceStore(tmp_path, "ns", {})
    sums = reference_logps(policy, examples, store, layout=Layout("concatenated"), device=CPU).sums
    batcher = RowBatcher(
        examples, sums if change is None else change(sums), Layout("concatenated"), CPU
    )
    objective = PairObjective(make_loss(DPOLossType(loss_type)))
    return check_step_zero(model or policy, objective, batcher, [[0, 1, 2, 3]], is_exact=True)


def test_the_loss_starts_at_ln_2(tmp_path):
    assert check(tmp_path) == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("loss_type", [x for x in ON_PAIRS if not LOSS_SPECS[x].reads_margin])
def test_every_loss_starts_at_its_constant(tmp_path, loss_type):
    """`check_step_zero` compares; a loss without a reference has nothing to be compared with."""
    reads_reference = LOSS_SPECS[loss_type].needs_reference
    assert check(tmp_path, loss_type, change=None if reads_reference else lambda sums: None) > 0


@pytest.mark.parametrize("loss_type", ["ipo", "exo_pair", "wpo"])
def test_a_loss_that_starts_elsewhere_is_seen(tmp_path, loss_type, monkeypatch):
    loss = type(make_loss(DPOLossType(loss_type)))
    right = loss.value_at_reference
    monkeypatch.setattr(loss, "value_at_reference", lambda *logps: 1.01 * right(*logps))
    with pytest.raises(CacheError, match="before the first step the loss is"):
        check(tmp_path, loss_type)


def test_a_shift_of_both_sides_leaves_the_loss_alone_and_is_still_seen(tmp_path):
    with pytest.raises(CacheError, match="chosen answer of row-"):
        check(tmp_path, change=lambda sums: sums + 0.5)


def test_another_base_on_the_policy_side_is_seen(tmp_path):
    with pytest.raises(CacheError, match="log-prob"):
        check(tmp_path, model=PolicyModel(tiny_model(seed=1)))


def test_swapped_sides_are_seen(tmp_path):
    with pytest.raises(CacheError):
        check(tmp_path, change=lambda sums: sums.flip(1))
