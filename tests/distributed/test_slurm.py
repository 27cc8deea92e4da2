"""`preftune launch slurm` against a real slurmctld, slurmd and munged, started here on loopback."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import arguments, tiny_model_folder, tiny_settings

DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd starts jobs only as root"),
]
CONF = """\
ClusterName=preftune
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldPort={ctld_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=10
MailProg=/bin/true
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd_port} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=60 State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory):
    """The environment of a cluster of one host, this one."""
    root = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (root / name).mkdir()
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o400)
    ports = [socket.socket() for _ in range(2)]
    for port in ports:
        port.bind(("127.0.0.1", 0))
    numbers = [port.getsockname()[1] for port in ports]
    for port in ports:
        port.close()
    host = socket.gethostname().split(".")[0]
    text = CONF.format(root=root, host=host, ctld_port=numbers[0], slurmd_port=numbers[1])
    (root / "slurm.conf").write_text(text)
    environment = os.environ | {"SLURM_CONF": str(root / "slurm.conf")}
    files = {"key": "key", "socket": "socket", "pid": "pid-file", "log": "log-file"}
    files |= {"seed": "seed-file"}
    names = {"key": "key-file", "socket": "socket"} | {k: v for k, v in files.items() if "-" in v}
    munged = [f"--{option}={root}/munge.{name}" for name, option in names.items()]
    commands = [
        ["munged", "--foreground", "--force", *munged],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "localhost"],
    ]
    started = []
    try:
        for command in commands:
            with (root / f"{command[0]}.out").open("w") as out:
                started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(1)
        until(lambda: "idle" in said(environment, "sinfo", "-h"), 60)
        yield environment
    finally:
        said(environment, "scancel", "--state=RUNNING", "--signal=KILL", "--full")
        said(environment, "scancel", "--state=RUNNING")
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def said(environment, *command):
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return result.stdout


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_an_interrupted_job_is_queued_again_and_a_cancelled_one_is_not(slurm, tmp_path):
    """Saves at a signal, ends with 75, is requeued, goes on; then cancelled, it stays so."""
    environment = slurm | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
    }
    settings = tiny_settings(
        tmp_path, checkpointing_steps=5, num_epochs=3000.0, gradient_accumulation_steps=1
    ) | {"progress": "plain", "logging_steps": 100}
    launch = [sys.executable, "-m", "preftune", "launch", "slurm", "--num_processes", "2"]
    launch += ["--gpus_per_host", "0", "--cpus_per_host", "2", "--time", "30"]
    result = subprocess.run(
        [*launch, "--", "train", *arguments(settings)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    job = re.fullmatch(r"Submitted batch job (\d+)\n", result.stdout)[1]
    log, checkpoints = tmp_path / f"preftune-{job}.log", tmp_path / "run" / "checkpoints"

    def state():
        return said(slurm, "squeue", "--noheader", "--jobs", job, "--format", "%T").strip()

    until(lambda: list(checkpoints.glob("step-*")), 150)
    said(slurm, "scancel", "--signal=TERM", job)  # what --signal=TERM@120 does near the time limit
    until(lambda: state() == "PENDING", 60)
    text = log.read_text()
    assert text.count("preftune: interrupted: SIGTERM received: stopped after step ") == 1
    assert f"interrupted with a checkpoint saved: job {job} is queued again" in text

    # Slurm lets a requeued job wait for two minutes, because a host refuses a start as old as the
    # end before it ("Job credential revoked"), to the second.
    time.sleep(5)
    said(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: "going on after step " in log.read_text(), 200)
    assert "Restarts=1" in said(slurm, "scontrol", "show", "job", job)
    until(lambda: log.read_text().count("train: ") >= 2, 60)
    said(slurm, "scancel", job)
    until(lambda: state() == "", 90)
    assert log.read_text().count("is queued again") == 1


def test_without_slurm_the_script_is_only_written_on_demand(tmp_path, capsys, monkeypatch):
    """Here Slurm is installed, but its programs are out of PATH."""
    from preftune.cli.main import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--num_processes", "2", "--", "train", "--model_name_or_path", "m"]
    options += ["--dataset_name", "d"]
    assert main(["launch", "slurm", *options]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_an_evaluation_job_runs_and_writes_its_numbers(slurm, tmp_path):
    """`preftune evaluate --eval_jobs slurm`: submitted once; the job's table is in its log."""
    pytest.importorskip("lm_eval", reason="not installed: lm-eval", exc_type=ImportError)
    from tests.peers.test_lm_eval import write_tasks

    environment = slurm | {
        "OMP_NUM_THREADS": "1",
        "PREFTUNE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
    }
    model, out = tiny_model_folder(tmp_path / "model"), tmp_path / "out"
    words = [sys.executable, "-m", "preftune", "evaluate", str(model), "--eval_jobs", "slurm"]
    words += ["--eval_tasks", *write_tasks(tmp_path), "--output", str(out), "--eval_slurm_options"]
    words += ["['--time=10', '--cpus-per-task=2']"]
    for answer in ("Submitted batch job", "submitted before (Submitted batch job"):
        result = subprocess.run(
            words,
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert f"slurm: {answer}" in result.stderr
    until(lambda: (out / "results.json").is_file(), 300)
    until(lambda: said(slurm, "squeue", "--noheader") == "", 60)
    (log,) = out.glob("slurm/*.log")
    assert "local_choice: acc" in log.read_text()
