"""What lies in a run's folder, as a report reads it; nothing there is changed."""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune.errors import CheckpointError

GROUPS = ("rewards", "logps", "logratios", "kl", "perf")
"""First halves of metric names that have two."""


@dataclass
class Curve:
    """One metric over the steps at which it was logged."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        """Number of points."""
        return len(self.steps)

    def finite(self) -> "Curve":
        """Without what is no number."""
        kept = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]
        return Curve([step for step, _ in kept], [value for _, value in kept])


@dataclass(frozen=True)
class MetricName:
    """The parts of a name such as `eval/mine/source/hh/rewards/margins`."""

    metric: str
    """`rewards/margins`."""
    held_out: bool
    label: str = ""
    """Of the held-out set; empty where there is one."""
    source: str = ""
    """Of the rows; empty for all of them."""

    @classmethod
    def of(cls, name: str) -> "MetricName":
        """Take a name apart."""
        words = name.split("/")
        if words[0] != "eval" or len(words) == 1:
            return cls(name, held_out=False)
        last = 2 if len(words) > 2 and words[-2] in GROUPS else 1
        label, _, source = f"/{'/'.join(words[1:-last])}".partition("/source/")
        return cls("/".join(words[-last:]), held_out=True, label=label.strip("/"), source=source)

    @property
    def where(self) -> str:
        """Which rows, for people."""
        if not self.held_out:
            return "training"
        return ", ".join(filter(None, ["held out", self.label, self.source]))


def unit_of(metrics: Collection[str]) -> str:
    """What a row of a run is that logs these metrics: a pair, or a single answer."""
    is_pair = "rewards/margins" in metrics and "rewards/baseline" not in metrics
    return "pairs" if is_pair else "rows"


@dataclass(frozen=True)
class RunRecord:
    """One run."""

    root: Path
    manifest: dict[str, Any]
    """run.json."""
    curves: dict[str, Curve]
    """By the full name of the metric, in the order of metrics.jsonl."""
    samples: list[dict[str, Any]]
    """Lines of samples.jsonl."""
    results: list[dict[str, Any]]
    """evaluation/results.json: numbers of the model before training and after."""
    win_rate: dict[str, Any] | None
    """evaluation/win_rate.json."""
    unread: list[str]
    """What of these files could not be read, as sentences."""

    @property
    def config(self) -> dict[str, Any]:
        """The resolved options."""
        return self.manifest.get("config", {})

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.config.get("run_name") or self.root.name)

    @property
    def last_step(self) -> int:
        """The last step that was logged."""
        return max((curve.steps[-1] for curve in self.curves.values()), default=0)


def read_run(root: Path) -> RunRecord:
    """Read the folder of a run, which may still be going on.

    Raises:
        CheckpointError: it is no run's folder.
    """
    manifest = _manifest(root)
    unread: list[str] = []
    curves: dict[str, Curve] = {}
    for line in _lines(root / "metrics.jsonl", unread):
        step = line.get("step")
        for name, value in line.items():
            if name != "step" and isinstance(step, int) and isinstance(value, int | float):
                curve = curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(float(value))
    results = _document(root / "evaluation" / "results.json", list, unread) or []
    return RunRecord(
        root,
        manifest,
        curves,
        list(_lines(root / "samples.jsonl", unread)),
        [row for row in results if isinstance(row, dict)],
        _document(root / "evaluation" / "win_rate.json", dict, unread),
        unread,
    )


def _manifest(root: Path) -> dict[str, Any]:
    path = root / "run.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(root)!r} is not the folder of a run: {path.name} cannot be read there "
            f"({error}); give the output_dir of a run"
        ) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
        raise CheckpointError(
            f"{path} was not written by preftune; give the output_dir of one of its runs"
        )
    return manifest


def _lines(path: Path, unread: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines; the last line of a run that goes on may be half written."""
    if not path.is_file():
        return
    num_bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            else:
                num_bad += 1
    if num_bad:
        unread.append(f"{num_bad} of the lines of {path.name} cannot be read and are left out")


def _document(path: Path, kind: type, unread: list[str]) -> Any:
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        document = None
    if isinstance(document, kind):
        return document
    unread.append(f"{path.parent.name}/{path.name} cannot be read and is left out")
    return None
