"""The command line of `preftune launch`: what runs, and mistakes told before anything does."""

import os
import sys

import pytest

from preftune.cli.main import main
from preftune.launch import environment

TRAIN = ["train", "--model_name_or_path", "m", "--dataset_name", "d e.jsonl"]
HYBRID = ["--fsdp", "hybrid_shard", "--fsdp_shard_size", "2"]
HOSTS = ["hosts", "--num_processes", "2", "--hosts", "a", "b", "--host_rank", "0"]


NO_GRADIENTS = {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "launch needs a command; write: preftune launch local, hosts, slurm"),
        (["lokal"], "launch lokal is not a command"),
        (["local", "--", *TRAIN], "num_processes is not set; give the processes of each host"),
        (["local", "--num_processes", "0", "--", *TRAIN], "--num_processes is 0; it must be 1"),
        (["local", "--num_proceses", "2", "--", *TRAIN], "did you mean --num_processes?"),
        (["local", "--num_processes", "2"], "launch needs a command to run; write it after --"),
        (["local", "--num_processes", "2", "--", "trian"], "trian is not a command that launch"),
        (["local", "--num_processes", "2", "--", *TRAIN, "--bata", "1"], "--bata is not an option"),
        (["local", "--num_processes", "2", "--", *TRAIN, "--beta", "0"], "--beta is 0.0"),
        (["local", "--num_processes", "2", "--", "data", "inspect"], "data is not a command that"),
        ([*HOSTS[:3], "--", *TRAIN], "hosts is not set; give the names or addresses"),
        ([*HOSTS, "--port", "80", "--", *TRAIN], "--port is 80; it must be 1024 to 65535"),
        ([*HOSTS[:-1], "2", "--", *TRAIN], "--host_rank is 2; there are 2 hosts"),
        ([*HOSTS, "--min_hosts", "3", "--", *TRAIN], "--min_hosts is 3; there are 2 hosts"),
        ([*HOSTS, "--min_hosts", "1", "--", *TRAIN], "set --total_batch_size after --"),
        ([*HOSTS, "--silence_seconds", "1", "--", *TRAIN], "--silence_seconds is 1.0; it must be"),
        (
            ["hosts", "--num_processes", "2", "--hosts", "a.invalid", "b.invalid", "--", *TRAIN],
            "none of them is a name or address of this machine; give --host_rank",
        ),
        (
            ["slurm", "--num_processes", "2", "--job_name", "A b", "--", *TRAIN],
            "--job_name is 'A b'",
        ),
        (
            ["kubernetes", "--num_processes", "2", "--", *TRAIN],
            "image is not set; give an image that has preftune installed",
        ),
        (["skypilot", "--num_processes", "2", "--", *TRAIN], "accelerator is not set; give the"),
        (
            ["local", "--num_processes", "3", "--", *TRAIN, *HYBRID],
            "fsdp_shard_size is 2, and 3 processes are launched",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(capsys, monkeypatch, tmp_path, words, text):
    monkeypatch.chdir(tmp_path)
    assert main(["launch", *words]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_within_another_launcher_it_refuses(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["launch", "local", "--num_processes", "2", "--", *TRAIN]) == 2
    assert "WORLD_SIZE is 4 in the environment" in capsys.readouterr().err


def test_more_processes_than_gpus_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert main(["launch", "local", "--num_processes", "3", "--", *TRAIN]) == 2
    assert "num_processes is 3; this host has 2 GPUs" in capsys.readouterr().err


def test_a_dry_run_prints_a_line_a_process(capsys, monkeypatch):
    monkeypatch.setattr(environment, "num_cores", lambda: 9)
    command = (
        f"{sys.executable} -m preftune train --model_name_or_path m --dataset_name 'd e.jsonl'"
    )
    assert main(["launch", "local", "--num_processes", "2", "--dry-run", "--", *TRAIN]) == 0
    note, *lines = capsys.readouterr().out.splitlines()
    assert note == "# FREE_PORT: a free port, chosen at each start"
    for rank, line in enumerate(lines):
        assert line.startswith(f"RANK={rank} LOCAL_RANK={rank} WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ")
        assert "MASTER_ADDR=127.0.0.1 MASTER_PORT=FREE_PORT" in line
        assert line.endswith(f" OMP_NUM_THREADS=4 {command}")
    assert main(["launch", *HOSTS, "--dry-run", "--", *TRAIN]) == 0
    _, second = capsys.readouterr().out.split("# host 1: b\n")
    assert (
        "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 MASTER_ADDR=a" in second
    )
    assert main(["launch", "local", "--num_processes", "1", "--dry-run", "--", *TRAIN]) == 0
    assert capsys.readouterr().out == f"OMP_NUM_THREADS=9 {command}\n"


def test_options_may_stand_in_a_file(capsys, tmp_path):
    path = tmp_path / "launch.yaml"
    path.write_text("num_processes: 2\nmax_restarts: -1\n")
    assert main(["launch", "local", str(path), "--", *TRAIN]) == 2
    assert f"{path} line 2: max_restarts is -1; it must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("before", [[], ["launch", "local", "--num_processes", "2", "--"]])
def test_what_accelerate_chooses_and_preftune_has_not_ends_both(capsys, monkeypatch, before):
    for name, value in NO_GRADIENTS.items():
        monkeypatch.setenv(name, value)
    assert main([*before, *TRAIN]) == 2
    said = capsys.readouterr().err
    assert "FSDP_SHARDING_STRATEGY is SHARD_GRAD_OP (from Accelerate's configuration)" in said
    # Processes that are launched inherit them; one that trains keeps others from acting on them.
    assert ("ACCELERATE_USE_FSDP" in os.environ) == bool(before)
