"""The check before the first step sees what the loss alone does not."""

import pytest
import torch

from preftune.batching.layout import Layout
from preftune.errors import CacheError
from preftune.losses import DPOLossType, make_loss
from preftune.model.forward import PolicyModel
from preftune.objective import PairBatcher, PreferenceObjective
from preftune.recipes.step_zero import check_step_zero
from preftune.reference.build import reference_logps
from preftune.reference.store import ReferenceStore
from tests.examples import make_examples
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def check(tmp_path, loss_type="dpo", change=None, model=None):
    examples = make_examples(4)
    policy = PolicyModel(tiny_model())
    store = ReferenceStore(tmp_path, "ns", {})
    sums = reference_logps(policy, examples, store, layout=Layout("concatenated"), device=CPU).sums
    batcher = PairBatcher(
        examples, sums if change is None else change(sums), Layout("concatenated"), CPU
    )
    objective = PreferenceObjective(make_loss(DPOLossType(loss_type)))
    return check_step_zero(model or policy, objective, batcher, [0, 1, 2, 3], is_exact=True)


@pytest.mark.parametrize("loss_type", ["dpo", "dpo_norm"])
def test_the_loss_starts_at_ln_2(tmp_path, loss_type):
    assert check(tmp_path, loss_type) == pytest.approx(0.693147, abs=1e-5)


def test_wpo_starts_at_ln_2_times_its_mean_weight(tmp_path):
    assert 0 < check(tmp_path, "wpo") < 0.6932


def test_reference_free_losses_have_nothing_to_compare(tmp_path):
    assert check(tmp_path, "simpo", change=lambda sums: None) > 0


def test_a_shift_of_both_sides_leaves_the_loss_alone_and_is_still_seen(tmp_path):
    with pytest.raises(CacheError, match="chosen answer of row-"):
        check(tmp_path, change=lambda sums: sums + 0.5)


def test_another_base_on_the_policy_side_is_seen(tmp_path):
    with pytest.raises(CacheError, match="log-prob"):
        check(tmp_path, model=PolicyModel(tiny_model(seed=1)))


def test_swapped_sides_are_seen(tmp_path):
    with pytest.raises(CacheError):
        check(tmp_path, change=lambda sums: sums.flip(1))
