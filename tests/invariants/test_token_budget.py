"""A token budget changes memory, never numbers; what does not fit is told before the first step."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from preftune.config.score import ScoreConfig
from preftune.errors import DataError
from preftune.recipes.score import score
from preftune.recipes.train import train
from tests.runs import read_metrics, tiny_config
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

BUDGETS = [40, 150, 100_000]


@pytest.mark.parametrize("layout", ["shared_prefix", "concatenated"])
def test_a_budget_changes_no_numbers(tmp_path, layout):
    settings = {"forward_layout": layout, "test_size": 0.25, "eval_strategy": "epoch"}
    whole = read_run(tmp_path, "whole", **settings)
    for budget in BUDGETS:
        packed = read_run(tmp_path, f"{budget}", max_tokens_per_microbatch=budget, **settings)
        assert len(packed) == len(whole)
        for one, other in zip(whole, packed, strict=True):
            assert one.keys() == other.keys()
            # Before the first step, displaced is a matter of the last bit.
            for key in one.keys() - {"num_tokens", "logratios/displaced"}:
                assert other[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), key


def read_run(root: Path, name: str, **settings) -> list[dict[str, float]]:
    # Warm enough that a wrong batch would show, cool enough that rounding stays rounding.
    train(tiny_config(root, output_dir=root / name, learning_rate=1e-4, **settings))
    return read_metrics(root / name)


def test_score_packs_to_the_budget_with_the_same_scores(tmp_path):
    config = tiny_config(tmp_path)
    common = {
        "model_name_or_path": config.model_name_or_path,
        "dataset_name": config.dataset_name,
        "cache_dir": config.cache_dir,
        "progress": "none",
        "mixed_precision": "fp32",
    }
    by_rows, by_tokens = (
        score(ScoreConfig(**common)),
        score(ScoreConfig(**common, max_tokens_per_microbatch=128)),
    )
    assert by_tokens.logps_chosen == pytest.approx(by_rows.logps_chosen, abs=1e-4)
    assert by_tokens.logps_rejected == pytest.approx(by_rows.logps_rejected, abs=1e-4)


def long_rows(root: Path, num_long: int, words: int = 150) -> Path:
    """40 pairs, of which the last `num_long` exceed the tiny model's 512 positions."""
    rows = make_pairs(40, seed=0)
    for row in rows[len(rows) - num_long :]:
        row["chosen"] = [{"role": "assistant", "content": "warm and rainy " * words}]
    return write_jsonl(root / "long.jsonl", rows)


def test_rows_over_the_models_context_are_dropped_with_the_reason(tmp_path):
    data = long_rows(tmp_path, 1)
    settings = {"dataset_name": data, "max_dropped_fraction": 0.05}
    train(tiny_config(tmp_path, **settings))
    counts = json.loads((tmp_path / "run/run.json").read_text())["data"]["train"]
    assert counts["dropped"] == {"over_context": 1}
    assert counts["dropped_rows"] == [["long.jsonl:40", "over_context"]]
    assert counts["num_pairs"] == 39


def test_many_rows_over_the_models_context_are_an_error_that_names_the_way_out(tmp_path):
    data = long_rows(tmp_path, 4)
    with pytest.raises(DataError, match=r"over_context: 4 rows .*set max_length to the model's"):
        train(tiny_config(tmp_path, dataset_name=data))
    train(tiny_config(tmp_path, dataset_name=data, max_length=512))  # asked for: no fault
    train(
        tiny_config(tmp_path, dataset_name=data, truncation="keep_start", output_dir=tmp_path / "b")
    )
    manifest = json.loads((tmp_path / "b/run.json").read_text())
    assert manifest["data"]["train"]["truncated"] == 4


def test_a_pair_over_the_budget_is_trained_alone_and_said(tmp_path, capsys):
    train(tiny_config(tmp_path, max_tokens_per_microbatch=40, progress="plain", num_epochs=1.0))
    said = capsys.readouterr()
    assert "have more than max_tokens_per_microbatch (40)" in said.out + said.err


OUT_OF_MEMORY = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from preftune.config.experiment import ExperimentConfig
    from preftune.errors import ConfigError
    from preftune.recipes.train import train
    from tests.runs import tiny_settings

    root = Path(sys.argv[1])
    settings = tiny_settings(root, max_length=None, num_epochs=1.0)
    train(ExperimentConfig(**settings | {"output_dir": str(root / "first")}))  # imports and caches
    import preftune.recipes.run as run
    lay_out = run.try_heaviest
    def short_of_memory(*args, **kwargs):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
        lay_out(*args, **kwargs)
    run.try_heaviest = short_of_memory
    extra = eval(sys.argv[3])
    try:
        train(ExperimentConfig(**settings | {"dataset_name": str(root / "long.jsonl")} | extra))
        print("finished")
    except ConfigError as error:
        print(error)
    """
)


@pytest.mark.slow
def test_lack_of_memory_is_told_before_the_first_step(tmp_path):
    # Real allocations fail here: the address space is bounded when the dry run begins.
    rows = make_pairs(40, seed=0)
    for row in rows[-8:]:
        row["chosen"] = [{"role": "assistant", "content": "warm and rainy " * 250}]
    write_jsonl(tmp_path / "long.jsonl", rows)
    tiny_model(max_position_embeddings=4096, intermediate_size=4096).save_pretrained(
        tmp_path / "model"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def attempt(extra: dict) -> str:
        command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path), str(90 * 2**20), repr(extra)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    text = attempt({"output_dir": str(tmp_path / "much")})
    assert "the heaviest micro-batch of this run (4 rows" in text
    assert "Set --max_tokens_per_microbatch" in text
    assert not (tmp_path / "much").exists()
