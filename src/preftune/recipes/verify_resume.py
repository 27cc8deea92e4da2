"""`preftune verify-resume`: whether a run that was stopped goes on as if it never had been."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from preftune.config.hub import HUB_OPTIONS
from preftune.config.verifying import VerifyResumeConfig
from preftune.distributed.runtime import Runtime
from preftune.errors import CheckpointError
from preftune.files import remove_tree
from preftune.recipes.train import train
from preftune.training.run_folder import RunFolder


@dataclass(frozen=True)
class ResumeReport:
    """What was found the same."""

    steps: int
    stopped_after: int
    num_metrics: int
    num_tensors: int

    def __str__(self) -> str:
        """As lines for people."""
        compared = self.steps - self.stopped_after
        return "\n".join(
            [
                f"{self.steps} steps straight, and the same stopped after step "
                f"{self.stopped_after} and resumed, are one run:",
                f"  order of data           the rows of {compared} steps",
                f"  metrics                 {self.num_metrics} numbers (all but perf/*)",
                f"  weights and optimizer   {self.num_tensors} tensors, bit for bit",
            ]
        )


@dataclass
class _Watched:
    """One of the two runs."""

    folder: RunFolder
    rows: dict[int, list[str]] = field(default_factory=dict)
    """Ids of the rows of each step that this process trained on, steps counted from 1."""

    def metrics(self) -> dict[int, dict[str, float]]:
        """All metrics of each step but those of speed."""
        lines = map(json.loads, self.folder.metrics.read_text().splitlines())
        return {
            line["step"]: {k: v for k, v in line.items() if not k.startswith("perf/")}
            for line in lines
        }


def verify_resume(config: VerifyResumeConfig) -> ResumeReport:
    """Train straight, and stopped and resumed, and compare.

    Args:
        config: the run, which is left alone, and how long to train.

    Returns:
        What is the same: everything.

    Raises:
        CheckpointError: the two runs part; both are kept in `output_dir`.verify-resume.
        PreftuneError: as `train`.
    """
    root = Path(f"{Path(config.output_dir).expanduser()}.verify-resume")
    experiment = replace(
        config.experiment(),
        num_epochs=None,
        max_train_steps=config.verify_steps,
        warmup_steps=config.warmup_steps and min(config.warmup_steps, config.verify_steps - 1),
        logging_steps=1,
        checkpointing_steps=config.stop_after,
        keep_last_n_checkpoints=None,
        checkpoint_max_gb=None,  # the checkpoint to resume from must stay
        early_stopping_patience=None,  # the two runs have the same steps
        early_stopping_threshold=None,
        sample_steps=None,
        num_samples=None,
        report_to=None,
        push_to_hub=False,
        **dict.fromkeys(HUB_OPTIONS),
        max_run_time=None,
    )
    runs = {name: _Watched(RunFolder(root / name)) for name in ("straight", "resumed")}
    stop = runs["straight"].folder.checkpoint(config.stop_after)
    for run, resume in zip(runs.values(), ("never", str(stop)), strict=True):
        again = replace(experiment, output_dir=str(run.folder.root), resume=resume)
        train(again, on_step=run.rows.__setitem__)

    def compare() -> ResumeReport:
        report = _compare(config, *runs.values())
        remove_tree(root)
        return report

    return Runtime("fp32", config.seed).decide(compare)


def _compare(config: VerifyResumeConfig, straight: _Watched, resumed: _Watched) -> ResumeReport:
    steps = range(config.stop_after + 1, config.verify_steps + 1)
    _compare_rows(straight.rows, resumed.rows, steps)
    num_metrics = _compare_metrics(straight.metrics(), resumed.metrics())
    one, other = (run.folder.checkpoint(config.verify_steps) for run in (straight, resumed))
    num_tensors = sum(
        _compare_tensors(path, other / path.name)
        for path in sorted(one.glob("*.safetensors"))
        if not path.name.startswith("rng")  # nothing draws from it after the last step
    )
    return ResumeReport(config.verify_steps, config.stop_after, num_metrics, num_tensors)


def _compare_rows(
    straight: Mapping[int, list[str]], resumed: Mapping[int, list[str]], steps: range
) -> None:
    if list(resumed) != list(steps):
        raise _parted(f"the resumed run trained on steps {list(resumed)}, not {list(steps)}")
    for step in steps:
        if resumed[step] != straight[step]:
            raise _parted(
                f"the order of the data parts at step {step}: straight it trained on "
                f"{', '.join(straight[step])}; resumed, on {', '.join(resumed[step])}"
            )


def _compare_metrics(
    straight: Mapping[int, Mapping[str, float]], resumed: Mapping[int, Mapping[str, float]]
) -> int:
    """How many numbers were compared."""
    if list(straight) != list(resumed):
        raise _parted(
            f"metrics.jsonl of the straight run has lines of steps {list(straight)}, of the "
            f"resumed one {list(resumed)}"
        )
    for step, line in straight.items():
        other = resumed[step]
        parted = [
            f"{key} {line.get(key)!r} straight and {other.get(key)!r} resumed"
            for key in sorted(line.keys() | other.keys())
            if not _same(line.get(key), other.get(key))
        ]
        if parted:
            raise _parted(f"the metrics part at step {step}: {'; '.join(parted)}")
    return sum(map(len, straight.values()))


def _same(one: Any, other: Any) -> bool:
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one)
    return one == other or (both_nan and math.isnan(other))


def _compare_tensors(straight: Path, resumed: Path) -> int:
    """How many tensors of a file were compared."""
    with safe_open(straight, "pt") as one, safe_open(resumed, "pt") as other:
        names = sorted(one.keys())
        if names != sorted(other.keys()):
            raise _parted(f"{straight.name} of the two runs' last steps hold other tensors")
        for name in names:
            first, second = one.get_tensor(name), other.get_tensor(name)
            if not torch.equal(first, second):
                largest = float((first.double() - second.double()).abs().max())
                raise _parted(
                    f"the metrics of all steps are the same, but {name} in {straight.name} differs "
                    f"after the last step, by {largest:.3g} at most"
                )
    return len(names)


def _parted(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what}. A resumed run of this configuration is not the straight one: on a GPU, kernels "
        "that add in another order each time may be the reason; else please report it. Both runs "
        "are kept in OUTPUT_DIR.verify-resume"
    )
