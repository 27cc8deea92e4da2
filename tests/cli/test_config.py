"""`preftune config`: presets, schema and diff as commands. `show` is in test_main."""

import json

import pytest

from preftune.cli.main import main
from preftune.config.experiment import ExperimentConfig
from preftune.config.json_schema import json_schema
from preftune.config.preset import preset_names, preset_path

FIRST = "model_name_or_path: m\ndataset_name: a.jsonl\nlearning_rate: 1e-6\n"


def out(capsys, *argv, code=0):
    assert main(["config", *argv]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_presets_are_listed_and_printed(capsys):
    lines = out(capsys, "presets").splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 4 for line in lines)
    assert out(capsys, "presets", "laptop") == preset_path("laptop").read_text(encoding="utf-8")


def test_the_schema_is_json(capsys):
    assert json.loads(out(capsys, "schema")) == json_schema(ExperimentConfig)


def test_diff_shows_resolved_values_that_differ(capsys, tmp_path):
    first, run = tmp_path / "a.yaml", tmp_path / "run"
    run.mkdir()
    first.write_text(FIRST, encoding="utf-8")
    changed = FIRST.replace("1e-6", "5e-7") + "beta: 0.1\nloss_type: simpo\nmax_grad_norm: 0\n"
    (run / "config.yaml").write_text(changed, encoding="utf-8")
    lines = out(capsys, "diff", str(first), str(run)).splitlines()
    assert [line.split() for line in lines] == [
        [str(first), str(run)],
        ["loss_type", "dpo", "simpo"],
        ["f_divergence", "reverse_kl", "not", "set"],
        ["learning_rate", "1.0e-06", "5.0e-07"],
        ["max_grad_norm", "1.0", "null"],
        ["gamma_beta_ratio", "not", "set", "0.5"],
    ]
    assert lines[0].index(str(first)) == lines[1].index("dpo")


def test_diff_tells_one_row_from_all_rows(capsys, tmp_path):
    files = []
    for name, amount in (("a.yaml", "1"), ("b.yaml", "1.0")):
        path = tmp_path / name
        path.write_text(f"model_name_or_path: m\ndataset_mixer: {{d: {amount}}}\n")
        files.append(str(path))
    text = out(capsys, "diff", *files)
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["dataset_mixer", "{d:", "1}", "{d:", "1.0}"]
    ]


def test_equal_configurations_are_said_to_be(capsys, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(FIRST, encoding="utf-8")
    second.write_text(FIRST + "beta: 0.1\n", encoding="utf-8")
    text = out(capsys, "diff", str(first), str(second))
    assert text == f"{first} and {second} resolve to the same configuration\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["presets", "zephyr"], "the preset is 'zephyr'; it must be handbook-dpo, "),
        (["presets", "a", "b"], "config presets got a b; write: preftune config presets [NAME]"),
        (["schema", "--beta"], "config schema got --beta; write: preftune config schema"),
        (["diff", "a.yaml"], "config diff got a.yaml; write: preftune config diff A B"),
        (["diff", "no.yaml", "no.yaml"], "no.yaml: the config file cannot be read: No such file"),
        (["diff", ".", "no.yaml"], "config.yaml: the config file cannot be read: No such file"),
        (["dif"], "config dif is not a command; write: preftune config show, presets, schema"),
    ],
)
def test_a_mistake_is_told(capsys, tmp_path, monkeypatch, argv, text):
    monkeypatch.chdir(tmp_path)
    assert text in out(capsys, *argv, code=2)


@pytest.mark.parametrize("command", ["show", "presets", "schema", "diff"])
def test_every_subcommand_has_help(capsys, command):
    assert out(capsys, command, "--help").startswith(f"usage: preftune config {command}")
