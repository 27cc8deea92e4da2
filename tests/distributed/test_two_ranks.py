"""Two processes train to the numbers of one."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune import train
from tests.launches import output_of, train_on_two_ranks
from tests.runs import pretend_unfinished, read_metrics, tiny_config, tiny_settings
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

pytestmark = pytest.mark.distributed


DECIDE = """
from preftune.distributed.runtime import Runtime, leave_process_group
from preftune.errors import ModelError

runtime = Runtime("fp32", seed=0)
assert runtime.world_size == 2
mine = {"rank": runtime.rank}
assert runtime.decide(lambda: mine) == {"rank": 0}

def fail():
    raise ModelError(f"no such luck on rank {runtime.rank}")

try:
    runtime.decide(fail)
except ModelError as error:
    assert str(error) == "no such luck on rank 0", error
else:
    raise SystemExit("nothing was raised")
leave_process_group()
"""


def test_what_rank_0_decides_or_raises_holds_for_all():
    output_of(2, "-c", DECIDE)


@pytest.mark.parametrize(
    ("num_pairs", "loss_type"), [(21, "dpo"), (17, "dpo"), (17, "beta_dpo"), (21, "aot")]
)
def test_two_ranks_equal_one(tmp_path, num_pairs, loss_type):
    """21 pairs end in a batch of 5, dealt 3 and 2; 17 in one of 1, which leaves a rank idle."""
    options = {"max_train_samples": num_pairs, "gradient_accumulation_steps": 1}
    options |= {"loss_type": loss_type, "eval_steps": 2}
    options |= {"eval_dataset": write_jsonl(tmp_path / "held_out.jsonl", make_pairs(5, seed=9))}
    one = {"per_device_train_batch_size": 8, "output_dir": tmp_path / "one"}
    train(tiny_config(tmp_path, **options, **one))
    two = {"per_device_train_batch_size": 4, "output_dir": tmp_path / "two"}
    settings = tiny_settings(tmp_path, **options, **two, cache_dir=tmp_path / "cache-of-two")
    train_on_two_ranks(settings)
    first, second = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(first) == len(second) == 6
    for expected, got in zip(first, second, strict=True):
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        for line in (got, expected):  # before the first step, a matter of the last bit
            line.pop("logratios/displaced")
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_each_rank_goes_on_with_its_own_random_numbers(tmp_path):
    """With dropout, on shares of different lengths: the ranks' generators part ways."""
    tiny_model(attention_dropout=0.3).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {"disable_dropout": False, "gradient_accumulation_steps": 1, "loss_type": "simpo"}
    options |= {"checkpointing_steps": 2, "num_epochs": None, "max_train_steps": 4}
    settings = tiny_settings(tmp_path, **options)
    train_on_two_ranks(settings)
    run, stopped = tmp_path / "run", tmp_path / "stopped"
    shutil.copytree(run, stopped)
    pretend_unfinished(stopped, 2)
    states = load_file(stopped / "checkpoints" / "step-00000002" / "rng.safetensors")
    assert not torch.equal(states["0/torch"], states["1/torch"])
    train_on_two_ranks(settings | {"output_dir": str(stopped)})
    assert read_metrics(stopped) == read_metrics(run)
    final = ["final", "model.safetensors"]
    assert stopped.joinpath(*final).read_bytes() == run.joinpath(*final).read_bytes()
    for name in ("model", "optimizer", "rng"):
        path = Path("checkpoints") / "step-00000004" / f"{name}.safetensors"
        assert (stopped / path).read_bytes() == (run / path).read_bytes()
