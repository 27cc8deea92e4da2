"""The host waits for the device on logging steps and on no others.

Counted below PyTorch's own dispatch, over whole runs: steps that do not log must add nothing.
"""

import pytest

from tests.syncs import syncs_of_a_run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "wpo"},
        {"loss_type": "simpo", "optimizer": "sgd"},
        {"loss_type": "aot"},
        {"loss_type": "beta_dpo"},
        {"max_tokens_per_microbatch": 96, "gradient_checkpointing": True},
        {"sync_reference": True, "reference_sync_steps": 3},
        {"on_nonfinite": "skip_batch", "loss_type": "bco"},
        {"mixed_precision": "fp16"},
        {"use_lora": True, "load_in_4bit": True},
        {"use_lora": True, "load_in_8bit": True},
    ],
    ids=[
        *("dpo", "wpo", "simpo-sgd", "aot", "beta_dpo", "checkpointing", "sync", "skip", "fp16"),
        *("4bit", "8bit"),
    ],
)
def test_steps_that_do_not_log_wait_for_nothing(tmp_path, settings):
    if settings.get("use_lora"):
        pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    settings = settings | {"num_epochs": None, "logging_steps": 100, "warmup_ratio": 0.0}
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, **settings)
    assert long == short


def test_padded_layouts_wait_once_a_forward_inside_transformers(tmp_path):
    # It looks whether the positions of the rows restart. The packed layout says so itself.
    settings = {"num_epochs": None, "logging_steps": 100, "warmup_ratio": 0.0}
    settings |= {"forward_layout": "concatenated", "gradient_accumulation_steps": 1}
    settings |= {"loss_type": "simpo"}  # no reference pass in the first run only
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, **settings)
    assert long == short + 7


def test_the_counter_sees_steps_that_log(tmp_path):
    settings = {"num_epochs": None, "warmup_ratio": 0.0}
    short = syncs_of_a_run(tmp_path, "short", max_train_steps=2, logging_steps=1, **settings)
    long = syncs_of_a_run(tmp_path, "long", max_train_steps=9, logging_steps=1, **settings)
    assert long >= short + 7
