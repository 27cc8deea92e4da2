"""What a stage reads, and what it refuses by name."""

import pytest

from preftune.config.composed import default_of, section_fields
from preftune.config.dpo import ONLY_WITH_PAIRS
from preftune.config.experiment import UNREAD_COLUMNS, ExperimentConfig
from preftune.config.problem import InvalidConfig
from preftune.losses.knobs import KNOBS, LossKnobs
from preftune.losses.spec import DPOLossType

NEEDED = {"model_name_or_path": "m", "dataset_name": "rows.jsonl"}
OTHERS = {
    "loss_type": "dpo",  # the default of the other stage, given all the same
    "loss_weights": [0.5],
    "sft_weight": 0.5,
    "sft_reduction": "token",
    "ld_alpha": 0.5,
    "reference_model_name_or_path": "other",
    "reference_model_revision": "main",
    "sync_reference": True,
    "reference_mixup_alpha": 0.5,
    "reference_sync_steps": 5,
    "concatenated_forward": True,
    "forward_layout": "separate",
    **{name: knob.choices[0] if knob.choices else 0.25 for name, knob in KNOBS.items()},
}


def sft(**given):
    return ExperimentConfig(**{**NEEDED, "stage": "sft", **given})


@pytest.mark.parametrize("key", OTHERS)
def test_sft_refuses_what_only_pairs_have(key):
    with pytest.raises(InvalidConfig) as caught:
        sft(**{key: OTHERS[key]})
    assert [problem.key for problem in caught.value.found] == [key]
    assert "stage sft" in str(caught.value)


def test_every_setting_of_a_loss_is_among_them():
    """Those of one loss, and all whose text speaks of the reference or of the loss."""
    assert {*LossKnobs.__dataclass_fields__} <= {*ONLY_WITH_PAIRS} <= {*OTHERS}
    named = [f.name for f in section_fields(ExperimentConfig) if f.name.startswith("reference_")]
    assert {*named} <= {*ONLY_WITH_PAIRS}


def test_the_file_of_sft_holds_none_of_them_and_reads_back():
    config = sft(learning_rate=1e-5, forward_layout="concatenated")
    assert not {*config.to_dict()} & {*ONLY_WITH_PAIRS}
    assert config.to_dict()["load_balancing_weight"] == 0.0  # is read
    assert ExperimentConfig(**config.to_dict()) == config
    fields = {field.name: field for field in section_fields(ExperimentConfig)}
    assert all(getattr(config, key) == default_of(fields[key]) for key in ONLY_WITH_PAIRS)


def test_stages_have_their_own_defaults():
    assert (sft().learning_rate, sft().loss_types, sft().row_kind) == (2e-5, [], "supervised")
    dpo = ExperimentConfig(**NEEDED)
    assert (dpo.learning_rate, dpo.loss_types, dpo.row_kind) == (5e-7, [DPOLossType.DPO], "pairs")
    assert ExperimentConfig(**NEEDED, loss_type="kto").row_kind == "labelled"
    assert not sft().needs_reference
    assert not sft().stores_reference
    metric = {"metric_for_best_model": "eval/perplexity", "eval_dataset": "e"}
    assert sft(**metric).greater_is_better is False


@pytest.mark.parametrize(
    ("stage", "column"), [(s, c) for s, columns in UNREAD_COLUMNS.items() for c in columns]
)
def test_a_column_of_another_stage_is_refused(stage, column):
    with pytest.raises(InvalidConfig, match=f"stage {stage} does not read '{column}'"):
        ExperimentConfig(**NEEDED, stage=stage, column_map={column: "x"})
