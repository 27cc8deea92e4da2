"""A lack of memory anywhere is told with numbers and a setting, and the run can go on.

Real allocations fail: a child process bounds its address space when a stage begins.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from preftune.training.memory import is_lack_of_memory, scoring_remedies, training_remedies
from tests.runs import tiny_settings
from tests.tiny import make_pairs, tiny_model, tiny_tokenizer, write_jsonl

CHILD = textwrap.dedent(
    """
    import json, resource, sys
    from pathlib import Path

    import preftune.recipes.evaluating as evaluating
    import preftune.recipes.reference as reference
    import preftune.recipes.score as scoring
    import preftune.training.loop as loop
    from preftune.config.experiment import ExperimentConfig
    from preftune.config.score import ScoreConfig
    from preftune.errors import PreftuneError
    from preftune.recipes.train import train

    settings, scored = json.loads(sys.argv[1])
    NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def bounded(function):
        def call(*args, **kwargs):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + 16 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
            return function(*args, **kwargs)
        return call

    def attempt(stage, module, name, command):
        original = getattr(module, name)
        setattr(module, name, bounded(original))
        try:
            command()
            told = [0, ""]
        except PreftuneError as error:
            told = [error.exit_code, str(error)]
        finally:
            resource.setrlimit(resource.RLIMIT_AS, NO_LIMIT)
            setattr(module, name, original)
        print(json.dumps([stage, *told]))

    def start(**changes):
        return lambda: train(ExperimentConfig(**settings | changes))

    attempt("reference", reference, "reference_logps", start())
    attempt("evaluation", evaluating, "evaluate_pairs", start())
    attempt("training", loop, "train_step", start())  # goes on after step 1
    attempt("score", scoring, "score_examples", lambda: scoring.score(ScoreConfig(**scored)))
    start(max_tokens_per_microbatch=2000, eval_strategy="epoch")()
    """
)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    tiny_model(max_position_embeddings=4096, intermediate_size=4096).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    rows = make_pairs(12, seed=0)
    for row in rows:
        row["chosen"] = [{"role": "assistant", "content": "warm and rainy " * 150}]
    settings = tiny_settings(
        root,
        dataset_name=write_jsonl(root / "long.jsonl", rows),
        test_size=4,
        eval_strategy="epoch",
        checkpointing_steps=1,
        num_epochs=1.0,
        gradient_accumulation_steps=1,
    )
    keys = ("model_name_or_path", "dataset_name", "cache_dir", "mixed_precision", "progress")
    scored = {key: settings[key] for key in keys}
    # Memory that is freed goes back to the system, and is missing when it is asked for again.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([settings, scored])],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Where DeepSpeed is installed, it speaks on stdout when Accelerate imports it.
    told = [line for line in done.stdout.splitlines() if line.startswith('["')]
    lines = [json.loads(line) for line in told]
    return root, {stage: (code, text) for stage, code, text in lines}


@pytest.mark.parametrize(
    ("stage", "parts"),
    [
        ("reference", ["a forward of up to 4096 tokens", "while the reference is scored"]),
        ("reference", ["Set a lower --max_length, or --dtype bfloat16; what is scored already"]),
        ("evaluation", ["the heaviest micro-batch (4 rows, ", "in evaluation"]),
        ("evaluation", ["Set --per_device_eval_batch_size 2, or --max_tokens_per_microbatch"]),
        ("training", ["the micro-batch (4 rows, ", "in step 2: "]),
        ("training", ["--per_device_train_batch_size 2 with --gradient_accumulation_steps 2"]),
        ("training", ["the same command with that goes on from the last checkpoint"]),
        ("score", ["a micro-batch (8 rows, ", "while pairs are scored"]),
        ("score", ["Set --per_device_eval_batch_size 4, or --max_tokens_per_microbatch"]),
    ],
)
def test_each_stage_names_its_numbers_and_a_setting(told, stage, parts):
    code, text = told[1][stage]
    assert code == 2, text
    for part in [*parts, "out of memory: ", " GiB were used so far, and there are "]:
        assert part in text


def test_the_run_went_on_from_its_checkpoint_with_a_smaller_micro_batch(told):
    run = told[0] / "run"
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["config"]["max_tokens_per_microbatch"] == 2000
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_other_errors_pass_as_they_are():
    assert not is_lack_of_memory(RuntimeError("shapes differ"))
    assert not is_lack_of_memory(ValueError("not enough memory: a file name"))
    assert is_lack_of_memory(MemoryError())


def test_a_single_row_has_other_remedies():
    assert training_remedies(1, 5000) == ["--gradient_checkpointing true", "a lower --max_length"]
    assert scoring_remedies(1, 5000) == ["a lower --max_length", "--dtype bfloat16"]
