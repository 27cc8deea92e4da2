"""Two processes train to the numbers of one."""

import os
import subprocess
import sys

import pytest

from preftune import train
from tests.runs import read_metrics, tiny_config, tiny_settings, train_on_two_ranks
from tests.tiny import make_pairs, write_jsonl

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
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", "0", "--standalone", "--no-python"]
    result = subprocess.run(
        [*launch, sys.executable, "-c", DECIDE],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr


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
