"""`preftune evaluate` on tiny models; a program that writes its file stands for the harness."""

import json
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.cli.main import main
from preftune.config.evaluate import EvaluateConfig
from preftune.errors import CheckpointError, ConfigError, ModelError
from preftune.evaluation.jobs import lm_eval
from preftune.evaluation.jobs.calls import JobFailed
from preftune.evaluation.jobs.subject import Subject
from preftune.recipes.evaluate import evaluate
from tests.judges import endpoint
from tests.runs import arguments, tiny_model_folder, tiny_settings
from tests.tiny import tiny_model, write_jsonl

PROGRAM = """\
import json, pathlib, sys
model, output = map(pathlib.Path, sys.argv[1:3])
size = (model / "model.safetensors").stat().st_size
if "fail" in sys.argv:
    print("no memory left"); sys.exit(9)
print("measured", size)
(output / "results.json").write_text(json.dumps({"mine": {"size": size}}))
with open(sys.argv[3], "a") as log: log.write(f"{model}\\n")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a larger model that is not."""
    root = tmp_path_factory.mktemp("models")
    tiny_model_folder(root / "base")
    tiny_model_folder(root / "trained")
    tiny_model(seed=1, num_hidden_layers=3).save_pretrained(root / "trained")
    return root


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return f"{sys.executable} {tmp_path / 'program.py'} {{model}} {{output}} {tmp_path / 'ran'}"


def config(tmp_path, models, **options):
    settings = {"output": str(tmp_path / "out"), "eval_base": str(models / "base")}
    settings |= {"progress": "none", "cache_dir": str(tmp_path / "cache")}
    return EvaluateConfig(**(settings | options))


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_command_for_both_models_once(tmp_path, models, program):
    wanted = config(tmp_path, models, eval_jobs=["command"], eval_command=program)
    text = evaluate(wanted, str(models / "trained"))
    sizes = {
        side: (models / side / "model.safetensors").stat().st_size for side in ("base", "trained")
    }
    (row,) = results(tmp_path)
    assert {side: row[side]["value"] for side in sizes} == sizes
    assert json.loads(Path(row["base"]["file"]).read_text()) == {"mine": {"size": sizes["base"]}}
    assert "mine: size" in text
    assert evaluate(wanted, str(models / "trained")) == text
    ran = (tmp_path / "ran").read_text().split()
    assert ran == [str(models / "base"), str(models / "trained")]  # not repeated
    logs = list((tmp_path / "out").glob("command/*/log.txt"))
    assert len(logs) == 2
    assert f"measured {sizes['base']}" in "".join(log.read_text() for log in logs)


def test_a_command_that_fails(tmp_path, models, program, capsys):
    """Exit code 1, with the log; the next try begins anew, and what was finished stays."""
    words = ["evaluate", str(models / "trained"), *arguments(config_words(tmp_path, models))]
    command = ["--eval_jobs", "command", "--eval_command"]
    assert main([*words, *command, f"{program} fail"]) == 1
    error = capsys.readouterr().err
    assert "command of the base model: " in error
    assert "ended with code 9" in error
    assert "no memory left" in error
    assert "log.txt" in error
    assert main([*words, *command, program]) == 0
    assert "mine: size" in capsys.readouterr().out


def config_words(tmp_path, models):
    return {
        "output": tmp_path / "out",
        "eval_base": models / "base",
        "progress": "none",
        "cache_dir": tmp_path / "cache",
    }


def test_a_command_that_compares_runs_once(tmp_path, models, program):
    template = program.replace("ran", "ran {base}")
    wanted = config(tmp_path, models, eval_jobs=["command"], eval_command=template)
    evaluate(wanted, str(models / "trained"))
    (row,) = results(tmp_path)
    assert row["base"] is None
    with pytest.raises(ConfigError, match="no model to compare with"):
        evaluate(replace(wanted, eval_base=None), str(models / "trained"))


def fake_harness(tmp_path, monkeypatch, models):
    """Stands for `python -m lm_eval`: writes the file that it would, and counts."""
    package = tmp_path / "site" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(
        "import json, pathlib, sys\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "out = pathlib.Path(given['--output_path']) / 'm'\n"
        "out.mkdir()\n"
        "tasks = given['--tasks'].split(',')\n"
        "assert 'broken' not in tasks\n"
        "held = {'acc,none': len(given['--model_args']) / 1000, 'acc_stderr,none': 0.01}\n"
        "higher = {t: {'acc': True} for t in tasks}\n"
        "text = json.dumps({'results': dict.fromkeys(tasks, held), 'higher_is_better': higher})\n"
        "(out / 'results_2026.json').write_text(text)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: object())

    def calls():
        lines = (tmp_path / "calls").read_text().splitlines()
        return [dict(zip(c[::2], c[1::2], strict=False)) for c in map(json.loads, lines)]

    return calls


def test_the_harness_runs_what_is_missing(tmp_path, monkeypatch, models):
    """Numbers are the harness's own; the base's serve another run; a new task alone is run."""
    calls = fake_harness(tmp_path, monkeypatch, models)
    wanted = config(tmp_path, models, eval_jobs=["lm_eval"], eval_tasks=["a"], eval_limit=7)
    evaluate(wanted, str(models / "trained"))
    assert [call["--limit"] for call in calls()] == ["7", "7"]
    assert calls()[0]["--model_args"] == f"pretrained={models / 'base'},dtype=float32"
    (row,) = results(tmp_path)
    for side in ("base", "trained"):
        held = json.loads(Path(row[side]["file"]).read_text())["results"]["a"]
        assert row[side]["value"] == held["acc,none"]
        assert row[side]["stderr"] == held["acc_stderr,none"]
        assert row[side]["file"].startswith(str(tmp_path / "out"))

    # Another output, as of another run from the same base: only the trained model is run.
    evaluate(replace(wanted, output=str(tmp_path / "other")), str(models / "trained"))
    assert [str(models / "trained") in call["--model_args"] for call in calls()] == [0, 1, 1]

    evaluate(replace(wanted, eval_tasks=["a", "b"]), str(models / "trained"))
    assert [call["--tasks"] for call in calls()[3:]] == ["b", "b"]
    assert [row["task"] for row in results(tmp_path)] == ["a", "b"]

    # What fails keeps what there is.
    with pytest.raises(JobFailed, match=r"lm_eval of the base model: .*code 1"):
        evaluate(replace(wanted, eval_tasks=["a", "broken"]), str(models / "trained"))
    assert [row["task"] for row in results(tmp_path)] == ["a", "b"]

    # With another setting nothing counts that was measured without it.
    evaluate(replace(wanted, eval_limit=8), str(models / "trained"))
    assert [call["--limit"] for call in calls()[-2:]] == ["8", "8"]
    assert [row["task"] for row in results(tmp_path)] == ["a"]


def test_another_model_needs_another_folder(tmp_path, models, program):
    wanted = config(tmp_path, models, eval_jobs=["command"], eval_command=program)
    evaluate(wanted, str(models / "trained"))
    with pytest.raises(CheckpointError, match="results of another model"):
        evaluate(wanted, str(models / "base"))


def test_the_digest_follows_what_decides_an_answer(tmp_path, models):
    """Weights, config, tokenizer and template; not the model card."""
    folder = tmp_path / "m"
    shutil.copytree(models / "base", folder)
    seen = [Subject(str(folder)).digest]
    (folder / "README.md").write_text("a card")
    assert Subject(str(folder)).digest == seen[0] == Subject(str(models / "base")).digest
    for name in ("config.json", "chat_template.jinja", "model.safetensors", "tokenizer.json"):
        with (folder / name).open("ab") as file:
            file.write(b" ")
        seen.append(Subject(str(folder)).digest)
    assert len(set(seen)) == 5
    assert Subject(str(folder), tokenizer=str(models / "base")).digest not in seen


def test_a_dry_run_runs_nothing(tmp_path, models, program, monkeypatch):
    fake_harness(tmp_path, monkeypatch, models)
    wanted = config(
        tmp_path,
        models,
        eval_jobs=["lm_eval", "command"],
        eval_tasks=["a"],
        eval_chat_template=True,
        eval_command=program,
        dry_run=True,
    )
    text = evaluate(wanted, str(models / "trained"))
    assert f"--model hf --model_args pretrained={models / 'base'},dtype=float32" in text
    assert text.count("--apply_chat_template") == 2
    assert text.count("program.py") == 2
    slurm = EvaluateConfig(
        eval_jobs=["slurm"],
        eval_tasks=["a", "b"],
        eval_batch_size="auto",
        eval_slurm_options=["--partition=gpu"],
        output=str(tmp_path / "out"),
        dry_run=True,
        progress="none",
    )
    text = evaluate(slurm, str(models / "trained"))
    assert "#SBATCH --partition=gpu\n" in text
    assert "--eval_jobs lm_eval --eval_tasks a b --eval_batch_size auto --output" in text
    assert not (tmp_path / "out").exists()


def test_slurm_is_asked_once(tmp_path, models, monkeypatch):
    """An sbatch that counts stands for Slurm; test_slurm.py has the real one."""
    fake_harness(tmp_path, monkeypatch, models)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path / "jobs"}\necho Submitted batch job 12\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    wanted = config(tmp_path, models, eval_jobs=["slurm"], eval_tasks=["a"])
    for _ in range(2):
        evaluate(wanted, str(models / "trained"))
    (script,) = (tmp_path / "jobs").read_text().split()
    assert f"--eval_base {models / 'base'}" in Path(script).read_text()


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with held-out pairs."""
    root = tmp_path_factory.mktemp("run")
    settings = tiny_settings(root, num_epochs=4.0, test_size=6, learning_rate=0.05)
    assert main(["train", *arguments(settings)]) == 0
    return root / "run"


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_training_ends_with_its_jobs(run, tmp_path, program, capsys):
    """A finished run only does what is left; a job that fails leaves it finished, and is told."""
    root = copy_of(run, tmp_path)
    before = (root / "run.json").read_bytes()
    words = ["train", str(root / "config.yaml"), "--output_dir", str(root), "--progress", "plain"]
    words += ["--eval_jobs", "command", "--eval_command"]
    assert main([*words, f"{program} fail"]) == 0
    error = capsys.readouterr().err
    assert "ended with code 9" in error
    assert f"run `preftune evaluate {root}` with the same eval_ options to try again" in error
    assert main([*words, program]) == 0
    assert "mine: size" in capsys.readouterr().err
    (row,) = json.loads((root / "evaluation" / "results.json").read_text())
    assert row["base"]["value"] > 0 < row["trained"]["value"]
    report = (root / "report.html").read_text("utf-8")
    assert "Before and after" in report
    assert "size" in report
    assert (root / "run.json").read_bytes() == before
    models = (tmp_path / "ran").read_text().split()
    assert models == [str(run.parent / "model"), str(root / "final")]


def test_runs_that_are_not_finished(run, tmp_path, program):
    root = copy_of(run, tmp_path)
    manifest = json.loads((root / "run.json").read_text()) | {"status": "running"}
    (root / "run.json").write_text(json.dumps(manifest))
    wanted = EvaluateConfig(eval_jobs=["command"], eval_command=program, progress="none")
    with pytest.raises(CheckpointError, match="is running, so there is no final/"):
        evaluate(wanted, str(root))


def test_a_quantised_base_is_refused(run, tmp_path):
    subject = Subject("base", adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "preftune.json").write_text('{"base": {"load_in_8bit": true}}')
    with pytest.raises(ModelError, match="preftune merge"):
        subject.refuse_quantized()


def longer(prompt, first, second):
    return f"Verdict: {'A' if len(first) > len(second) else 'B'}"


def test_a_judge_reads_answers_to_held_out_prompts(run, tmp_path):
    """Both orders of each pair; interrupted in its middle, it goes on with what is left."""
    root = copy_of(run, tmp_path)
    with endpoint(longer) as server:
        wanted = EvaluateConfig(
            judge="openai",
            judge_model="m",
            judge_base_url=server.url,
            judge_max_new_tokens=24,
            progress="none",
        )
        text = evaluate(wanted, str(root))
        found = json.loads((root / "evaluation" / "win_rate.json").read_text())
        pairs = [
            json.loads(line)
            for line in (root / "evaluation/judge/pairs.jsonl").read_text().splitlines()
        ]
        assert found["num_prompts"] == len(pairs) == 6
        assert found["wins"] == sum(len(p["trained"]) > len(p["base"]) for p in pairs)
        asked = len(server.bodies)
        assert asked == 2 * sum(p["trained"] != p["base"] for p in pairs) > 0
        held_out = {json.dumps(pair["prompt"]) for pair in pairs}
        assert len(held_out) == 6
        assert evaluate(wanted, str(root)) == text
        assert len(server.bodies) == asked  # all kept

        (kept,) = (root / "evaluation" / "judge").glob("verdicts-*.jsonl")
        lines = kept.read_text().splitlines(keepends=True)
        assert len(lines) >= 2
        kept.write_text("".join(lines[:-2]) + lines[-2][:20])
        assert evaluate(wanted, str(root)) == text
        assert len(server.bodies) == asked + 4


def test_judge_prompts_of_a_file(run, tmp_path):
    root = copy_of(run, tmp_path)
    rows = [
        {"prompt": "Name a synonym."},
        {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]},
        {"prompt": "Name a synonym."},
    ]
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "always_b.py").write_text("def judge(prompt, a, b):\n    return 'B'\n")
    words = ["evaluate", str(root), "--judge", "function", "--judge_function", "always_b:judge"]
    words += ["--judge_prompts", str(file), "--judge_max_new_tokens", "4", "--progress", "none"]
    sys.path.insert(0, str(tmp_path))
    try:
        assert main(words) == 0
    finally:
        sys.path.remove(str(tmp_path))
    found = json.loads((root / "evaluation" / "win_rate.json").read_text())
    assert (found["num_prompts"], found["ties"], found["win_rate"]["rate"]) == (2, 2, 0.5)
    write_jsonl(file, [{"prompt": [{"role": "assistant", "content": "y"}]}])
    assert main(words) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "there is nothing to do"),
        ({"eval_jobs": ["lm_eval"]}, "needs tasks"),
        ({"eval_jobs": ["lm_evil"]}, "must be lm_eval, command"),
        ({"eval_jobs": ["lm_eval", "slurm"], "eval_tasks": ["a"]}, "leave lm_eval or slurm out"),
        ({"eval_jobs": ["lm_eval", "lm_eval"], "eval_tasks": ["a"]}, "named twice"),
        ({"eval_jobs": ["lm_eval"], "eval_tasks": ["a,b"]}, "separate names by spaces"),
        ({"eval_jobs": ["command"]}, "needs one, such as"),
        ({"eval_jobs": ["command"], "eval_command": "x {output}"}, "where the model goes"),
        ({"eval_jobs": ["command"], "eval_command": "x {modle}"}, "{modle} is no place"),
        ({"eval_jobs": ["command"], "eval_command": "x '{model}"}, "No closing quotation"),
        ({"eval_jobs": ["command"], "eval_command": "x {model}", "eval_limit": 3}, "nothing reads"),
        ({"eval_jobs": ["beaker"], "eval_tasks": ["a"]}, "needs an image"),
        (
            {"eval_jobs": ["beaker"], "eval_tasks": ["a.yaml"], "beaker_image": "i"},
            "is a file here",
        ),
        ({"judge_num_prompts": 3, "eval_jobs": ["command"], "eval_command": "x {model}"}, "nobody"),
        ({"judge": "openai", "judge_model": "m"}, "must name where the endpoint is"),
        (
            {"judge": "reward_model", "judge_model": "m", "judge_base_url": "http://x"},
            "not read it",
        ),
        ({"judge": "openai", "judge_model": "m", "judge_base_url": "http://u:pw@x"}, r"://\*\*\*@"),
        ({"judge": "function", "judge_function": "x"}, "must be module:function"),
    ],
)
def test_options_that_cannot_work(options, said):
    with pytest.raises(ConfigError, match=said) as caught:
        EvaluateConfig(**options)
    assert "pw" not in str(caught.value)
