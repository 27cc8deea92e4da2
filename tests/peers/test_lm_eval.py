"""lm-evaluation-harness itself, on local tasks, before and after training (the extra eval).

Here a tiny model; docs/evaluate.md has SmolLM2.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from preftune.cli.main import main
from preftune.errors import ConfigError
from preftune.evaluation.jobs.lm_eval import check_harness
from tests.runs import arguments, tiny_settings
from tests.tiny import make_pairs, write_jsonl

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="not installed: lm-eval"),
]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
PERPLEXITY = """\
task: local_perplexity
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""


def write_tasks(root):
    """Which answer is likelier, and the perplexity of the chosen one."""
    rows = []
    for number, pair in enumerate(make_pairs(12, seed=5, completion_words=(1, 3))):
        sides = [pair[side][0]["content"] for side in ("chosen", "rejected")]
        choices = sides[::-1] if number % 2 else sides
        row = {"question": pair["prompt"][0]["content"], "choices": choices, "label": number % 2}
        rows.append(row | {"answer": sides[0]})
    data = write_jsonl(root / "rows.jsonl", rows)
    for name, text in (("choice", CHOICE), ("perplexity", PERPLEXITY)):
        (root / f"{name}.yaml").write_text(text.format(data=data))
    return [str(root / "choice.yaml"), str(root / "perplexity.yaml")]


@pytest.mark.parametrize("adapter", [False, True])
def test_numbers_are_the_harness_own(tmp_path, capsys, adapter):
    """After training, for both models; and once more for nothing."""
    tasks = write_tasks(tmp_path)
    settings = tiny_settings(tmp_path, learning_rate=0.05 if not adapter else 0.5)
    settings |= {"use_lora": "true", "lora_r": 4} if adapter else {}
    words = ["train", *arguments(settings), "--eval_jobs", "lm_eval", "--eval_tasks", *tasks]
    words += ["--eval_chat_template", "true", "--eval_batch_size", "4"]
    assert main(words) == 0
    out = tmp_path / "run" / "evaluation"
    rows = json.loads((out / "results.json").read_text())
    names = [(row["task"], row["metric"]) for row in rows]
    assert names == [("local_choice", "acc"), ("local_perplexity", "perplexity")]
    for row in rows:
        for side in ("base", "trained"):
            held = json.loads(Path(row[side]["file"]).read_text())
            values = held["results"][row["task"]]
            assert row[side]["value"] == values[f"{row['metric']},none"]
            assert row[side]["stderr"] == values[f"{row['metric']}_stderr,none"]
            assert held["n-samples"][row["task"]]["effective"] == 12
            assert held["chat_template"]
    assert rows[1]["base"]["value"] != rows[1]["trained"]["value"]
    assert [row["higher_is_better"] for row in rows] == [True, False]
    calls = sorted(path.stat().st_mtime_ns for path in out.glob("lm_eval/*/call.json"))
    assert len(calls) == 2

    capsys.readouterr()
    words = ["evaluate", str(tmp_path / "run"), "--eval_jobs", "lm_eval", "--eval_tasks", *tasks]
    words += ["--eval_chat_template", "true", "--eval_batch_size", "4"]
    words += ["--cache_dir", str(tmp_path / "cache"), "--progress", "none"]
    assert main(words) == 0
    assert "local_choice: acc" in capsys.readouterr().out
    assert sorted(p.stat().st_mtime_ns for p in out.glob("lm_eval/*/call.json")) == calls


def test_names_that_it_does_not_know():
    with pytest.raises(ConfigError, match="hella_swag: lm-evaluation-harness does not know"):
        check_harness(["hellaswag", "hella_swag"], ask=True)
