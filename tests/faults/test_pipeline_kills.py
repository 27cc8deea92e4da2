"""`preftune pipeline`, killed with kill -9 in each stage and run again: the same bytes.

On a tiny model, and on the embedded one where it is (see tests/invariants/test_smollm2.py), which
takes some ten minutes on two cores.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.pipelines import outputs, pipeline_file

_CACHE = Path(os.environ.get("PREFTUNE_CACHE", "~/.cache/preftune")).expanduser()
MODEL = Path(os.environ.get("PREFTUNE_MODEL", _CACHE / "models" / "SmolLM2-135M-Instruct"))
DATA = Path(os.environ.get("PREFTUNE_DATA", "absent")) / "rasbt-polite"
SECONDS = 900

pytestmark = pytest.mark.slow


def tiny(root: Path) -> Path:
    return pipeline_file(root, lora=True)


def embedded(root: Path) -> Path:
    """Six steps of each training."""
    if not DATA.is_dir():
        pytest.skip("PREFTUNE_DATA holds no rasbt-polite")
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"no model in {MODEL}; run `preftune quickstart` once, or set PREFTUNE_MODEL")
    train = str(DATA / "train.jsonl")
    settings = {
        "output_dir": str(root / "chain"),
        "cache_dir": str(root / "cache"),
        "model_name_or_path": str(MODEL),
        "use_lora": True,
        "learning_rate": 1e-4,
        "max_train_steps": 6,
        "max_train_samples": 48,
        "per_device_train_batch_size": 2,
        "checkpointing_steps": 2,
        "mixed_precision": "fp32",
        "progress": "none",
        "stages": {
            "sft": {"dataset_name": train, "column_map": {"completion": "chosen"}},
            "dpo": {"dataset_name": train},
            "merge": None,
            "evaluate": {"dataset_name": str(DATA / "test.jsonl")},
        },
    }
    path = root / "chain.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
    return path


def run(path: Path, *, until: Callable[[], bool] | None = None) -> None:
    """Run it to its end, or kill it once something holds."""
    process = subprocess.Popen([sys.executable, "-m", "preftune", "pipeline", str(path)])
    began = time.monotonic()
    try:
        while process.poll() is None:
            assert time.monotonic() - began < SECONDS
            if until is not None and until():
                process.send_signal(signal.SIGKILL)
                assert process.wait() == -signal.SIGKILL
                return
            time.sleep(0.005)
        assert until is None, "it ended before it could be killed"
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("make", [tiny, embedded])
def test_killed_in_each_stage_it_gives_what_the_unbroken_one_gives(make, tmp_path):
    path = make(tmp_path)
    chain = tmp_path / "chain"
    run(path)
    expected = outputs(chain)
    assert len(expected) > 10
    shutil.rmtree(chain)
    met = []
    for stage, sign in {
        "sft": "checkpoints/step-*",
        "dpo": "checkpoints/step-*",
        "merge": "stage.json",
        "evaluate": "stage.json",
    }.items():
        run(path, until=lambda stage=stage, sign=sign: any((chain / stage).glob(sign)))
        unfinished = {
            "merge": not (chain / "merge" / "model").exists(),
            "evaluate": not (chain / "evaluate" / "results.json").exists(),
        }
        met.append(unfinished.get(stage, not (chain / stage / "final").exists()))
    assert met == [True] * 4, "a kill came after its stage"
    run(path)
    assert outputs(chain) == expected
