"""A manifest for Kubernetes: a job whose pods are the hosts, and the service that names them."""

import shlex
from typing import Any

import yaml

from preftune.config.launch import LaunchKubernetesConfig
from preftune.errors import ConfigError, Interrupted, TrainingDiverged
from preftune.launch.inner import inner_command, write_for
from preftune.launch.program import Program

CONTAINER = "preftune"
_SAVE_SECONDS = 300
"""What a pod that is told to end gets for one step and one checkpoint."""


def kubernetes_manifest(program: Program, config: LaunchKubernetesConfig) -> list[dict[str, Any]]:
    """The documents of the manifest.

    Args:
        program: what the processes run.
        config: what the job asks for.
    """
    name = config.job_name
    metadata = {"name": name, "labels": {"app": name}}
    if config.namespace is not None:
        metadata["namespace"] = config.namespace
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": _spec(config)}
    job["spec"]["template"]["spec"]["containers"] = [_container(program, config)]
    if config.num_hosts == 1:
        return [job]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        # Headless: it gives each pod a name, <job>-<index>.<job>.
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app": name},
        },
    }
    return [service, job]


def _spec(config: LaunchKubernetesConfig) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _SAVE_SECONDS,
        # NCCL needs more shared memory than the 64 MiB that a container has by itself.
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if config.num_hosts > 1:
        pod["subdomain"] = config.job_name
    if config.volume_claim is not None:
        claim = {"claimName": config.volume_claim}
        pod["volumes"].append({"name": "data", "persistentVolumeClaim": claim})
    final = [ConfigError.exit_code, TrainingDiverged.exit_code]
    return {
        "completionMode": "Indexed",
        "completions": config.num_hosts,
        "parallelism": config.num_hosts,
        "backoffLimit": config.max_restarts,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _on_exit(final)},
                # Interrupted with a checkpoint saved: a new pod goes on, and counts for nothing.
                {"action": "Ignore", "onExitCodes": _on_exit([Interrupted.exit_code])},
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"metadata": {"labels": {"app": config.job_name}}, "spec": pod},
    }


def _on_exit(codes: list[int]) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": "In", "values": codes}


def _container(program: Program, config: LaunchKubernetesConfig) -> dict[str, Any]:
    name = config.job_name
    hosts = " ".join(f"{name}-{rank}.{name}" for rank in range(config.num_hosts))
    command = inner_command(
        program,
        config,
        config,
        ["preftune"],
        hosts=hosts,
        host_rank='"$JOB_COMPLETION_INDEX"',
    )
    # The shell gives its place to the launcher, which then gets the signals of the pod.
    lines = [*(config.setup or []), f"exec {command}"]
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": config.image,
        "command": ["/bin/sh", "-c", " && ".join(lines)],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    resources: dict[str, Any] = {}
    if config.gpus_per_host:
        resources["limits"] = {"nvidia.com/gpu": str(config.gpus_per_host)}
    if config.cpus_per_host is not None:
        resources["requests"] = {"cpu": str(config.cpus_per_host)}
    if resources:
        container["resources"] = resources
    if config.volume_claim is not None:
        container["volumeMounts"].append({"name": "data", "mountPath": config.mount_path})
        container["workingDir"] = config.mount_path
    return container


def describe_kubernetes(program: Program, config: LaunchKubernetesConfig) -> str:
    """The manifest, and what to do with it."""
    text = yaml.safe_dump_all(
        kubernetes_manifest(program, config), sort_keys=False, width=float("inf")
    )
    return f"# {_start(config)}\n{text}".rstrip("\n")


def write_kubernetes(program: Program, config: LaunchKubernetesConfig) -> int:
    """Write the manifest; gives the exit code."""
    return write_for(_start(config), config.manifest, describe_kubernetes(program, config))


def _start(config: LaunchKubernetesConfig) -> str:
    return f"kubectl apply -f {shlex.quote(config.manifest)}"
