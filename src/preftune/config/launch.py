"""The options of `preftune launch`: where the processes of a command run."""

import re
from dataclasses import dataclass

from preftune.config.composed import ComposedConfig
from preftune.config.problem import Problem, below, count, sbatch_option_problems
from preftune.config.section import Section

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")
"""What Kubernetes takes as the name of a job; the others take it, too."""


@dataclass(kw_only=True)
class ProcessesSection(Section):
    """Processes of each host, and what happens when one is lost."""

    num_processes: int | None = None
    """Processes on each host, 1 or more: as many as it has GPUs. Must be given."""

    max_restarts: int = 3
    """How often all processes are started again, from the last checkpoint, after one was lost; 0 or
    more. Wrong input, divergence and an interruption (exit codes 2, 3 and 75) end at once."""

    end_seconds: float = 30.0
    """After one process is lost: seconds in which the others may end by themselves, and finish a
    checkpoint that is being written, before they are killed; 1 or more."""

    dry_run: bool = False
    """Print what would run, and end."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("num_processes", self.num_processes)
        if self.num_processes is None:
            found.append(Problem("num_processes", None, "give the processes of each host"))
        found += count("max_restarts", self.max_restarts, least=0)
        return found + below("end_seconds", self.end_seconds, 1, "it must be 1 or more")

    @property
    def processes(self) -> int:
        """`num_processes`, given."""
        assert self.num_processes is not None  # by `problems`
        return self.num_processes


@dataclass(kw_only=True)
class HostsSection(Section):
    """Several hosts, each of which runs the same command."""

    hosts: list[str] | None = None
    """Names or addresses of the hosts. On the first, the others meet; all must reach it. Must be
    given."""

    host_rank: int | None = None
    """Which of `hosts` this one is, from 0. Unset: the one that has a name or address of this
    machine."""

    port: int = 29400
    """Port of the first host at which the others meet, 1024 to 65535."""

    min_hosts: int | None = None
    """Go on with so many hosts when the others do not come, 1 or more. Fewer hosts keep the same
    steps only with `total_batch_size`, which must then be set. Unset: all."""

    join_seconds: float = 300.0
    """How long to wait for hosts, at the start and after one was lost; 1 or more."""

    silence_seconds: float = 30.0
    """A host that has said nothing for so long is lost; 2 or more. Hosts speak each second,
    whatever their processes do."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = below("join_seconds", self.join_seconds, 1, "it must be 1 or more")
        found += below("silence_seconds", self.silence_seconds, 2, "it must be 2 or more")
        if not 1024 <= self.port <= 65535:
            found.append(Problem("port", self.port, "it must be 1024 to 65535"))
        if not self.hosts:
            message = "give the names or addresses of all hosts"
            return [*found, Problem("hosts", self.hosts, message)]
        if len(set(self.hosts)) < len(self.hosts):
            found.append(Problem("hosts", self.hosts, "a host is named twice; keep one"))
        number = len(self.hosts)
        if self.host_rank is not None and not 0 <= self.host_rank < number:
            message = f"there are {number} hosts: it must be 0 to {number - 1}"
            found.append(Problem("host_rank", self.host_rank, message, ("hosts",)))
        if self.min_hosts is not None and not 1 <= self.min_hosts <= number:
            message = f"there are {number} hosts: it must be 1 to {number}"
            found.append(Problem("min_hosts", self.min_hosts, message, ("hosts",)))
        return found


@dataclass(kw_only=True)
class JobSection(Section):
    """A job on several hosts, described in a file."""

    job_name: str = "preftune"
    """Name of the job: lower-case letters, digits and - inside, 52 at most."""

    num_hosts: int = 1
    """Hosts of the job, 1 or more."""

    gpus_per_host: int | None = None
    """GPUs that the job asks for on each host, 0 (CPU only) or more. Unset: `num_processes`."""

    cpus_per_host: int | None = None
    """CPU cores that the job asks for on each host, 1 or more. Unset: what the system gives."""

    setup: list[str] | None = None
    """Shell commands that each host runs first, such as "source venv/bin/activate". One that fails
    ends the job."""

    def __post_init__(self) -> None:
        """A GPU for each process unless told otherwise."""
        if self.gpus_per_host is None:
            self.gpus_per_host = getattr(self, "num_processes", None)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("num_hosts", self.num_hosts)
        found += count("gpus_per_host", self.gpus_per_host, least=0)
        found += count("cpus_per_host", self.cpus_per_host)
        if not _NAME.fullmatch(self.job_name):
            message = "it must be lower-case letters, digits and - inside, 52 at most"
            found.append(Problem("job_name", self.job_name, message))
        return found


@dataclass(kw_only=True)
class SlurmSection(Section):
    """What Slurm is asked for."""

    script: str = "preftune.sbatch"
    """File that the batch script is written to, and submitted from."""

    submit: bool = True
    """Submit the script with sbatch; false: only write it."""

    time: str | None = None
    """Time limit of the job, as Slurm writes it: 60, 12:00:00, 1-12:00:00. Unset: the
    partition's."""

    signal_seconds: int = 120
    """How long before the time limit the run is told to save and stop, 30 or more; it is then
    requeued and goes on."""

    sbatch_options: list[str] | None = None
    """Further options of sbatch, such as --partition=gpu --account=lab, in quotes in a YAML list
    or in brackets: "['--partition=gpu', '--account=lab']"."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("signal_seconds", self.signal_seconds, least=30)
        found += sbatch_option_problems("sbatch_options", self.sbatch_options)
        if self.time is not None and not re.fullmatch(r"[0-9]+([-:][0-9:]+)?", self.time):
            message = "it must be as Slurm writes it: 60, 12:00:00, 1-12:00:00"
            found.append(Problem("time", self.time, message))
        return found


@dataclass(kw_only=True)
class KubernetesSection(Section):
    """What Kubernetes is asked for."""

    manifest: str = "preftune.k8s.yaml"
    """File that the manifest is written to, for kubectl apply -f."""

    image: str | None = None
    """Container image that has preftune installed. Must be given."""

    namespace: str | None = None
    """Namespace of the job. Unset: that of whoever applies the manifest."""

    volume_claim: str | None = None
    """Name of a PersistentVolumeClaim with the model, the data and `output_dir`, which all hosts
    share. Unset: none, so that what the job writes is lost unless the image brings a file system.
    """

    mount_path: str = "/data"
    """Where `volume_claim` is mounted; relative paths start there."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = []
        if not self.image:
            found.append(Problem("image", self.image, "give an image that has preftune installed"))
        if not self.mount_path.startswith("/"):
            found.append(Problem("mount_path", self.mount_path, "it must start with /"))
        for key in ("namespace", "volume_claim"):
            value = getattr(self, key)
            if value is not None and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value):
                message = "it must be lower-case letters and digits, and - or . inside"
                found.append(Problem(key, value, message))
        return found


@dataclass(kw_only=True)
class SkypilotSection(Section):
    """What SkyPilot is asked for."""

    task: str = "preftune.sky.yaml"
    """File that the task is written to, for sky launch or sky jobs launch."""

    accelerator: str | None = None
    """Kind of GPU, such as H100; must be given unless `gpus_per_host` is 0."""

    infra: str | None = None
    """Where to run, such as aws, gcp/us-central1 or k8s. Unset: where it is cheapest."""

    use_spot: bool = False
    """Take machines that may be taken away again: with sky jobs launch the run goes on."""

    workdir: str | None = None
    """Local folder that is copied to the hosts. Unset: none."""

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        gpus = getattr(self, "gpus_per_host", None)
        others = ("gpus_per_host", "num_processes")
        if self.accelerator is None and gpus:
            message = "give the kind of GPU, such as H100, or --gpus_per_host 0"
            return [Problem("accelerator", None, message, others)]
        if self.accelerator is not None and gpus == 0:
            message = "gpus_per_host is 0, so there is none: leave it out"
            return [Problem("accelerator", self.accelerator, message, others)]
        return []


@dataclass(kw_only=True)
class LaunchLocalConfig(ComposedConfig, ProcessesSection):
    """Several processes on this machine."""


@dataclass(kw_only=True)
class LaunchHostsConfig(ComposedConfig, ProcessesSection, HostsSection):
    """Several processes on each of several hosts."""


@dataclass(kw_only=True)
class LaunchSlurmConfig(ComposedConfig, ProcessesSection, JobSection, SlurmSection):
    """A job of Slurm."""


@dataclass(kw_only=True)
class LaunchKubernetesConfig(ComposedConfig, ProcessesSection, JobSection, KubernetesSection):
    """A job of Kubernetes."""


@dataclass(kw_only=True)
class LaunchSkypilotConfig(ComposedConfig, ProcessesSection, JobSection, SkypilotSection):
    """A task of SkyPilot."""
