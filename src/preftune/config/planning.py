"""The configuration of `preftune plan`."""

from dataclasses import dataclass, fields
from pathlib import Path

from preftune.config.experiment import ExperimentConfig
from preftune.config.gpus import GPUS, known_gpu
from preftune.config.problem import Problem, count
from preftune.config.section import Section

CPU = "cpu"


@dataclass(kw_only=True)
class PlanningConfig(Section):
    """Where the run would run, and how fast that is."""

    device: str | None = None
    """The devices to plan for: cpu, or a GPU such as H100 or A100-40 (a name that is
    not known is answered with those that are). Unset: with `device_memory_gib`, any GPU; else this
    machine's GPU, or its CPU."""

    device_memory_gib: float | None = None
    """Memory of one device in GiB, above 0. Unset: that of `device`."""

    num_processes: int = 1
    """Devices over all hosts, one process each; 1 or more."""

    processes_per_host: int | None = None
    """Devices of one host, 1 or more; hybrid_shard cuts over these. Unset: `num_processes`, 8 at
    most."""

    tokens_per_second: float | None = None
    """Rate of all devices together, above 0: a measured `perf/tokens_per_second`. Unset: see
    `measured_run`."""

    measured_run: str | None = None
    """Folder of a run whose `metrics.jsonl` gives the rate. Unset: the arithmetic of a step over
    the peak rate of `device`, times `mfu`: an estimate."""

    mfu: float | None = None
    """Share of the device's peak rate that a step is assumed to reach, above 0, at most 1. Unset:
    0.35."""

    json: bool = False
    """Print the plan as JSON."""

    @property
    def host_size(self) -> int:
        """Devices of one host."""
        return self.processes_per_host or min(self.num_processes, 8)

    def problems(self) -> list[Problem]:
        """Everything wrong inside this section."""
        found = count("num_processes", self.num_processes)
        found += count("processes_per_host", self.processes_per_host)
        if self.device is not None and self.device != CPU and known_gpu(self.device) is None:
            message = f"it must be cpu or one of {', '.join(GPUS)}; give others by "
            message += "--device_memory_gib alone"
            found.append(Problem("device", self.device, message))
        for key in ("device_memory_gib", "tokens_per_second", "mfu"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                found.append(Problem(key, value, "it must be above 0"))
        if self.mfu is not None and self.mfu > 1:
            found.append(Problem("mfu", self.mfu, "it is a share: at most 1"))
        return found + _rate_problems(self)


def _rate_problems(section: PlanningConfig) -> list[Problem]:
    rate, run = section.tokens_per_second, section.measured_run
    found = []
    if rate is not None and run is not None:
        message = f"tokens_per_second is {rate:g} too: leave one out"
        found.append(Problem("measured_run", run, message, ("tokens_per_second",)))
    elif run is not None and not (Path(run).expanduser() / "metrics.jsonl").is_file():
        message = "there is no metrics.jsonl in it; give the folder of a run (its output_dir)"
        found.append(Problem("measured_run", run, message))
    if section.mfu is not None and (rate is not None or run is not None):
        message = "the rate is given, so nothing reads it: leave it out"
        found.append(Problem("mfu", section.mfu, message, ("tokens_per_second", "measured_run")))
    return found


@dataclass(kw_only=True)
class PlanConfig(ExperimentConfig, PlanningConfig):
    """The training run that is planned, flat, and where it would run."""

    def cross_problems(self) -> list[Problem]:
        """Settings that contradict each other."""
        found = ExperimentConfig.cross_problems(self)
        size, number = self.sequence_parallel_size, self.num_processes
        if size >= 1 and number >= 1 and number % size:
            message = f"it must divide num_processes, which is {number}"
            found.append(Problem("sequence_parallel_size", size, message, ("num_processes",)))
        return found

    def experiment(self) -> ExperimentConfig:
        """The run alone."""
        own = {field.name: getattr(self, field.name) for field in fields(ExperimentConfig)}
        return ExperimentConfig(**own)
