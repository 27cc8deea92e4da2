"""Processes that share each packed row train to the numbers of one process."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from preftune import train
from preftune.config.experiment import ExperimentConfig
from preftune.errors import ModelError
from preftune.model.forward import PolicyModel
from preftune.model.layout_choice import LayoutChoice
from preftune.recipes.train import share_rows
from tests.distributed.beside_one import TRAIN_ALL, check_equal, runs
from tests.launches import output_of
from tests.runs import read_metrics
from tests.tiny import tiny_model

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent

LOSSES = {
    "every token's log-prob": {"loss_type": "wpo", "ld_alpha": 0.5},
    "all pairs together": {"loss_type": "aot"},
    "what the loss keeps": {"loss_type": "beta_dpo"},
    "prompts scored": {"loss_type": "orpo", "orpo_nll": "sequence"},
    "mismatched answers": {"loss_type": "kto"},
    "a reference that follows": {"sync_reference": True, "reference_sync_steps": 2},
    "experts": {"model_name_or_path": "mixture", "load_balancing_weight": 0.1},
}
ALONE = ("orpo", "simpo")
"""Losses without a reference."""


def train_both(
    root: Path, cases: Mapping[str, Mapping[str, Any]], num_processes: int, **changes: Any
) -> None:
    """The cases on one process here, into one/, and on several with `changes`, into many/."""
    for settings in runs(root, cases, "one"):
        train(ExperimentConfig(**settings))
    (root / "many.json").write_text(json.dumps(runs(root, cases, "many", **changes)))
    output_of(num_processes, TRAIN_ALL, root / "many.json")
    for name in cases:
        check_equal(root / "one" / name, root / "many" / name)


def stored(cache: Path) -> dict[str, bytes]:
    """Reference log-probs, by the name of their file."""
    return {p.name: p.read_bytes() for p in (cache / "reference").rglob("*.safetensors")}


def test_rows_that_a_model_takes_padded_only_are_refused():
    group = SimpleNamespace(size=2)
    runtime: Any = SimpleNamespace(sequence_group=group, share=lambda error: error)
    policy = PolicyModel(tiny_model())
    choice = LayoutChoice("concatenated", "Bloom does not follow the packed layout: it differs")
    with pytest.raises(ModelError) as error:
        share_rows(policy, choice, runtime)
    assert str(error.value) == (
        "sequence_parallel_size is 2, which shares out packed rows, and Bloom does not follow the "
        "packed layout: it differs; set it to 1"
    )
    assert policy.sequence_group is None


@pytest.mark.slow
def test_two_processes_share_the_rows_of_every_architecture():
    printed = output_of(2, HERE / "share_rows.py", 2)
    assert "gpt_oss: " in printed


@pytest.mark.slow
def test_four_processes_share_the_rows_of_every_architecture():
    """As many as there are heads, and more than there are heads of keys."""
    printed = output_of(4, HERE / "share_rows.py", 4)
    assert "gpt_oss: " in printed


@pytest.mark.slow
def test_two_processes_that_share_rows_equal_one(tmp_path):
    """21 pairs a pass, in batches of 8, 8 and 5; ten steps are three passes and one more."""
    ten = {"max_train_steps": 10, "eval_steps": 5}
    cases = {
        "8x1": ten | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        "1x8": ten | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        "recomputed": {"gradient_checkpointing": True, "max_tokens_per_microbatch": 100},
    }
    train_both(tmp_path, cases, 2, sequence_parallel_size=2)
    # The reference's rows are not shared: its values are those of one process, to the bit.
    values = stored(tmp_path / "cache-one")
    assert values
    assert stored(tmp_path / "cache-many") == values


@pytest.mark.slow
def test_what_reads_the_whole_row_or_batch_is_right(tmp_path):
    train_both(tmp_path, LOSSES, 2, sequence_parallel_size=2)


@pytest.mark.slow
def test_two_groups_of_two_equal_one_process(tmp_path):
    """17 pairs end in a batch of 1, which leaves a group idle."""
    own = {"gradient_accumulation_steps": 1, "max_train_steps": 6}
    cases = {
        "dpo": own | {"max_train_samples": 17},
        "beta_dpo": own | {"max_train_samples": 17, "loss_type": "beta_dpo"},
        "aot": own | {"loss_type": "aot"},
        "experts": own | {"model_name_or_path": "mixture"},
    }
    one = {name: case | {"per_device_train_batch_size": 8} for name, case in cases.items()}
    train_both(tmp_path, one, 4, sequence_parallel_size=2, per_device_train_batch_size=4)


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    options = {"sequence_parallel_size": 2, "checkpointing_steps": 2}
    cases = {"straight": options, "stopped": options}
    # As many pairs a step, dealt out by pairs from there on.
    cases["other"] = options | {"sequence_parallel_size": 1, "gradient_accumulation_steps": 1}
    straight, *cut = runs(tmp_path, cases, "many")
    for settings in cut:
        settings["cut"] = [straight["output_dir"], 2]
    (tmp_path / "many.json").write_text(json.dumps([straight, *cut]))
    output_of(2, TRAIN_ALL, tmp_path / "many.json")
    whole, stopped, other = (tmp_path / "many" / name for name in cases)
    assert read_metrics(stopped) == read_metrics(whole)
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1]
    check_equal(whole, other)
