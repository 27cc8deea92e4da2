"""The command: help, exit codes, errors as text, and what is not imported."""

import subprocess
import sys

import pytest

import preftune
from preftune.cli import main as cli
from preftune.cli.main import COMMANDS, main
from preftune.config.experiment import ExperimentConfig
from preftune.config.parser import parse_config
from preftune.errors import CheckpointError, ConfigError, Interrupted, TrainingDiverged

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command} " in text for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"preftune {preftune.__version__}\n"


def test_no_command_prints_the_help_and_is_an_error(capsys):
    assert main([]) == 2
    assert "usage: preftune COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "trian is not a command; did you mean train?"),
        (["zzz"], "zzz is not a command; they are train, check, plan, score, evaluate"),
        (["config", "shw"], "config shw is not a command; write: preftune config show"),
        (["config"], "config needs a command; write: preftune config show"),
        (["train", "--beta", "x", *NEEDED], "command line: --beta is 'x'; it must be a finite"),
        (["check", "--bata", "1", *NEEDED], "--bata is not an option; did you mean --beta?"),
        (["score", *NEEDED, "--loss_type", "dpo"], "--loss_type is not an option"),
        (["score", *NEEDED, "--kl_samples", "9"], "--kl_samples is 9; without reference_model"),
        (
            ["score", *NEEDED, "--kl_max_new_tokens", "9"],
            "9; without kl_samples nothing is sampled",
        ),
        (["quickstart", "a.yaml"], "'a.yaml' belongs to no option"),
    ],
)
def test_a_mistake_is_told_on_stderr_without_a_traceback(capsys, argv, text):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("preftune: error: ")
    assert text in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: preftune {command} ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("bad"), 2, "preftune: error: bad\n"),
        (CheckpointError("torn"), 2, "preftune: error: torn\n"),
        (TrainingDiverged("nan"), 3, "preftune: error: nan\n"),
        (Interrupted("saved"), 75, "preftune: interrupted: saved\n"),
        (KeyboardInterrupt(), 1, "preftune: interrupted\n"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, text):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == text


def test_an_unforeseen_error_shows_its_traceback(capsys, monkeypatch):
    def fail(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_config_show_prints_a_config_that_can_be_run(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 2e-6\n", encoding="utf-8")
    argv = [str(path), *NEEDED, "--output_dir", "a # b", "--column_map", "{prompt: 'x: y'}"]
    assert main(["config", "show", *argv]) == 0
    text = capsys.readouterr().out
    assert f"learning_rate: 2.0e-06  # {path} line 1\n" in text
    assert "output_dir: 'a # b'  # command line\n" in text
    assert "\nbeta: 0.1\n" in text
    written = tmp_path / "resolved.yaml"
    written.write_text(text, encoding="utf-8")
    assert parse_config(ExperimentConfig, [str(written)]) == parse_config(ExperimentConfig, argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        ["data", "inspect", "--help"],
        ["data", "tokenize", "--help"],
        ["cache", "build", "--help"],
        ["cache", "show"],
        ["cache", "prune", "--older_than", "0"],
        ["cache", "export", "--help"],
        ["report", "no-run"],
        ["config", "show", *NEEDED],
        ["train", "--beta", "0"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_before_it_is_needed(argv):
    program = (
        "import sys; from preftune.cli.main import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, *argv]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "preftune", "trian"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "preftune: error: trian is not a command; did you mean train?\n"
