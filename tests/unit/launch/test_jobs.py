"""The files for Slurm, Kubernetes and SkyPilot, read by their own packages where those are."""

import json
import shutil
import subprocess

import pytest
import yaml

from preftune.cli.main import main

TRAIN = ["--", "train", "--model_name_or_path", "m", "--dataset_name", "a b.jsonl"]
KUBERNETES = ["kubernetes", "--num_processes", "8", "--image", "registry.example/preftune:1"]
SKYPILOT = ["skypilot", "--num_processes", "8", "--accelerator", "H100"]


def written(capsys, *words):
    """What `--dry-run` prints."""
    assert main(["launch", *words, "--dry-run", *TRAIN]) == 0
    return capsys.readouterr().out


def test_the_batch_script_is_one_for_bash_and_asks_for_what_was_given(capsys):
    script = written(
        capsys,
        *("slurm", "--num_processes", "8", "--num_hosts", "4", "--time", "12:00:00"),
        *("--cpus_per_host", "96", "--sbatch_options", "['--partition=gpu', '--account=lab']"),
        *("--setup", "module load cuda", "source venv/bin/activate"),
    )
    lines = script.splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert directives == [
        "--job-name=preftune",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--output=preftune-%j.log",
        "--open-mode=append",
        "--requeue",
        "--signal=TERM@120",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--time=12:00:00",
        "--partition=gpu",
        "--account=lab",
    ]
    assert lines.index("module load cuda") < lines.index("source venv/bin/activate")
    assert "launch hosts --hosts $PREFTUNE_HOSTS --host_rank $SLURM_NODEID" in script
    assert "a b.jsonl" in script
    assert lines[-1] == "# sbatch preftune.sbatch"
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n"], input=script, text=True, check=True)


def test_a_script_is_written_without_submitting(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--num_processes", "2", "--script", "job.sbatch"]
    assert main(["launch", "slurm", *options, "--submit", "false", *TRAIN]) == 0
    assert capsys.readouterr().err == "preftune launch: wrote job.sbatch\n"
    shown = written(capsys, "slurm", *options, "--submit", "false")
    assert shown == "# job.sbatch\n" + (tmp_path / "job.sbatch").read_text()


@pytest.mark.parametrize("num_hosts", [1, 4])
def test_kubernetes_own_client_reads_the_manifest_whole(capsys, num_hosts):
    """What it does not know it would drop, and what is needed and absent it refuses."""
    client = pytest.importorskip("kubernetes.client", reason="the kubernetes package is absent")
    text = written(
        capsys,
        *(*KUBERNETES, "--num_hosts", str(num_hosts), "--cpus_per_host", "96"),
        *("--namespace", "research", "--volume_claim", "team-data"),
    )
    documents = list(yaml.safe_load_all(text))
    kinds = {"Job": "V1Job", "Service": "V1Service"}
    assert [d["kind"] for d in documents] == (["Job"] if num_hosts == 1 else ["Service", "Job"])
    api = client.ApiClient()

    for document in documents:
        model = api.deserialize(json.dumps(document), kinds[document["kind"]], "application/json")
        assert api.sanitize_for_serialization(model) == document


def test_a_job_of_kubernetes_ends_at_wrong_input_and_goes_on_after_an_interruption(capsys):
    job = yaml.safe_load(written(capsys, *KUBERNETES, "--gpus_per_host", "0"))
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert [(r["action"], r.get("onExitCodes", {}).get("values")) for r in rules] == [
        ("FailJob", [2, 3]),
        ("Ignore", [75]),
        ("Ignore", None),
    ]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"][-1] == (
        "exec preftune launch local --num_processes 8 --max_restarts 3 --end_seconds 30 "
        "-- train --model_name_or_path m --dataset_name 'a b.jsonl'"
    )
    assert "resources" not in container


@pytest.mark.parametrize("spot", ["true", "false"])
def test_skypilot_itself_reads_the_task(capsys, monkeypatch, tmp_path, spot):
    monkeypatch.setenv("HOME", str(tmp_path))  # it writes there
    sky = pytest.importorskip("sky", reason="the skypilot package is absent")
    options = ["--num_hosts", "2", "--infra", "aws", "--use_spot", spot, "--cpus_per_host", "96"]
    text = written(capsys, *SKYPILOT, *options, "--setup", "pip install preftune")
    task = sky.Task.from_yaml_config(yaml.safe_load(text))
    assert task.num_nodes == 2
    (resources,) = task.resources
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot is (spot == "true")
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
    assert task.setup == "pip install preftune"
    assert task.run.startswith("preftune launch hosts --hosts $SKYPILOT_NODE_IPS --host_rank")


def test_the_files_are_written_with_how_to_start_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, name in ((KUBERNETES, "preftune.k8s.yaml"), (SKYPILOT, "preftune.sky.yaml")):
        assert main(["launch", *words, *TRAIN]) == 0
        told = capsys.readouterr().err
        text = (tmp_path / name).read_text()
        assert text == written(capsys, *words)
        start = text.splitlines()[0].removeprefix("# ")
        assert told == f"preftune launch: wrote {name}; start it with: {start}\n"
