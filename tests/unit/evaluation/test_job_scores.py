"""What jobs find: results files as they are, one form of them, a table of 80 columns."""

import json

import pytest

from preftune.errors import ConfigError
from preftune.evaluation.jobs.calls import JobFailed
from preftune.evaluation.jobs.command import read_results as read_command
from preftune.evaluation.jobs.lm_eval import read_scores, task_digests, task_name
from preftune.evaluation.jobs.scores import Score, compare, read_results, table, write_results

HARNESS = {
    "results": {
        "arc": {
            "name": "arc",
            "alias": " - arc",
            "sample_len": 3,
            "acc,none": 1 / 3,
            "acc_stderr,none": 0.2,
            "exact_match,strict": 0.5,
            "exact_match_stderr,strict": "N/A",
        },
        "ppl": {"alias": "ppl", "perplexity,none": 12.5, "perplexity_stderr,none": 0.5},
    },
    "higher_is_better": {"arc": {"acc": True, "exact_match": True}, "ppl": {"perplexity": False}},
}


def write(path, held):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(held if isinstance(held, str) else json.dumps(held))
    return path


def test_the_harness_file_is_read_as_it_is(tmp_path):
    write(tmp_path / "m" / "results_2025-01-01T00-00-00.json", "{}")
    file = write(tmp_path / "m" / "results_2026-01-01T00-00-00.json", HARNESS)
    assert read_scores(tmp_path) == [
        Score("arc", "acc", 1 / 3, 0.2, str(file), True),
        Score("arc", "exact_match (strict)", 0.5, None, str(file), True),
        Score("ppl", "perplexity", 12.5, 0.5, str(file), False),
    ]


@pytest.mark.parametrize("text", ["{", "[]", '{"results": [1]}', '{"results": {"a": 1}}'])
def test_a_harness_file_that_cannot_be_read(tmp_path, text):
    with pytest.raises(JobFailed, match="wrote no results"):
        read_scores(tmp_path)
    write(tmp_path / "results_x.json", text)
    with pytest.raises(JobFailed, match=r"results_x\.json cannot be read"):
        read_scores(tmp_path)


def test_a_program_may_write_numbers(tmp_path):
    assert read_command(tmp_path) == []
    held = {"mine": {"accuracy": 1, "score": {"value": 3.5, "stderr": 0.25}}}
    file = str(write(tmp_path / "results.json", held))
    assert read_command(tmp_path) == [
        Score("mine", "accuracy", 1.0, None, file),
        Score("mine", "score", 3.5, 0.25, file),
    ]
    write(tmp_path / "results.json", '{"mine": {"accuracy": "high"}}')
    with pytest.raises(JobFailed, match="it must be"):
        read_command(tmp_path)


def test_both_models_side_by_side(tmp_path):
    """Later numbers of the same task win; what only one model has stays."""
    base = [Score("a", "acc", 0.25, 0.1, "b", True), Score("old", "acc", 1.0, None, "b", True)]
    trained = [
        Score("a", "acc", 0.5, 0.1, "t0", True),
        Score("a", "acc", 0.75, 0.1, "t", True),
        Score("new", "ppl", 3.0, None, "t", False),
    ]
    rows = compare("lm_eval", base, trained)
    assert [(r.task, r.base and r.base.value, r.trained and r.trained.value) for r in rows] == [
        ("a", 0.25, 0.75),
        ("new", None, 3.0),
        ("old", 1.0, None),
    ]
    path = tmp_path / "evaluation" / "results.json"
    write_results(path, rows)
    assert read_results(path) == rows
    assert json.loads(path.read_text())[0] == {
        "job": "lm_eval",
        "task": "a",
        "metric": "acc",
        "higher_is_better": True,
        "base": {"value": 0.25, "stderr": 0.1, "file": "b"},
        "trained": {"value": 0.75, "stderr": 0.1, "file": "t"},
    }
    path.write_text('{"a": ')
    assert read_results(path) == []


def test_the_table():
    base = [
        Score("arc", "acc", 0.5, 0.1, "b", True),
        Score("ppl", "perplexity", 8.0, None, "b", False),
    ]
    trained = [
        Score("arc", "acc", 0.25, 0.1, "t", True),
        Score("ppl", "perplexity", 7.5, None, "t", False),
    ]
    assert table(compare("j", base, trained)) == (
        "task: metric          base     trained     difference\n"
        "arc: acc         0.5 ± 0.1  0.25 ± 0.1  -0.25 (worse)\n"
        "ppl: perplexity          8         7.5           -0.5"
    )


@pytest.mark.parametrize("length", [1, 20, 60, 200])
def test_the_table_is_80_columns_at_most(length):
    scores = [Score("x" * length, "acc (strict-match)", 0.123456, 0.0123456, "f", True)]
    rows = compare("j", scores, [Score("x" * length, "acc (strict-match)", 0.1, 0.01, "f", True)])
    lines = table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert len({len(line) for line in lines}) == 1


def test_a_task_is_known_by_all_that_it_reads(tmp_path):
    """Its file, what lies beside it, the data; and nothing else."""
    data = write(tmp_path / "data" / "rows.jsonl", "{}")
    text = f"task: mine\nfn: !function helper.f\ndataset_kwargs:\n  data_files: {{test: {data}}}\n"
    task = str(write(tmp_path / "tasks" / "mine.yaml", text))
    helper = write(tmp_path / "tasks" / "helper.py", "def f(): ...")
    assert task_name(task) == "mine"
    seen = [task_digests([task])[task]]
    write(tmp_path / "tasks" / "notes.txt", "x")
    assert task_digests([task])[task] == seen[0]
    for path in (data, helper, tmp_path / "tasks" / "mine.yaml"):
        path.write_text(path.read_text() + "\n")
        seen.append(task_digests([task])[task])
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("- a", "describes no task"),
        ("a: 1", "no `task`"),
        ("{", "not YAML"),
    ],
)
def test_files_that_are_no_tasks(tmp_path, text, said):
    if text is not None:
        write(tmp_path / "t.yaml", text)
    with pytest.raises(ValueError, match=said):
        task_name(str(tmp_path / "t.yaml"))


def test_the_harness_is_an_extra(monkeypatch):
    from preftune.evaluation.jobs import lm_eval

    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'preftune\[eval\]'"):
        lm_eval.check_harness(["arc_easy"], ask=False)
