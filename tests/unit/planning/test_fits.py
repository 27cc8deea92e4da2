"""The smallest change: in which order changes are tried, and that they can be applied."""

from typing import Any

from preftune.config.planning import PlanConfig
from preftune.errors import ConfigError
from preftune.planning.fits import changes, smallest_change

POSITIONS = 16_000


def config(**options: Any) -> PlanConfig:
    return PlanConfig(model_name_or_path="m", dataset_name="d.jsonl", device="L4", **options)


def test_what_keeps_the_numbers_comes_first():
    tried: list[PlanConfig] = []

    def never(other: PlanConfig) -> bool:
        tried.append(other)
        return False

    assert smallest_change(config(), never, POSITIONS) is None
    first = [c.max_tokens_per_microbatch for c in tried[:4]]
    assert first == [8000, 4000, 2000, 1000]
    kinds = [
        "adapters" if c.use_lora else "devices" if c.num_processes > 1 else c.optimizer
        for c in tried
    ]
    assert list(dict.fromkeys(kinds)) == ["adamw", "adamw_torch_8bit", "devices", "adapters"]
    assert tried[-1].offload_param


def test_the_first_that_fits_is_taken_and_made_no_larger_than_needed():
    change = smallest_change(config(), lambda c: c.gradient_checkpointing is True, POSITIONS)
    assert change is not None
    assert change.flags == "--gradient_checkpointing true"

    def fits(other: PlanConfig) -> bool:
        tokens = other.max_tokens_per_microbatch or POSITIONS
        return other.optimizer == "adamw_torch_8bit" and tokens <= 4000

    change = smallest_change(config(), fits, POSITIONS)
    assert change is not None
    assert change.options["max_tokens_per_microbatch"] == 4000
    assert change.applied(config()).optimizer == "adamw_torch_8bit"


def test_every_change_but_those_that_contradict_can_be_applied():
    refused = []
    for change in changes(config(), POSITIONS):
        try:
            change.applied(config())
        except ConfigError as error:
            refused.append((change.options, str(error)))
    assert not refused
    words = {key for change in changes(config(), POSITIONS) for key in change.options}
    assert {"fsdp", "use_lora", "load_in_4bit", "offload_optimizer"} <= words


def test_quantised_runs_are_not_told_to_cut_weights():
    quantized = config(use_lora=True, load_in_4bit=True)
    for change in changes(quantized, POSITIONS):
        assert "fsdp" not in change.options
        assert "zero_stage" not in change.options
