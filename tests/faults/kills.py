"""Runs that are killed at random instants, and what is left of them.

A process that has imported everything forks, and the child runs `preftune train`: a kill -9 then
meets the work of a run, not the minutes of imports. The parent runs no model, so that each child
begins as a fresh process does.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.runs import arguments, read_metrics, tiny_settings
from tests.tiny import make_pairs, write_jsonl

STAGES = ("tokenising", "reference", "training", "saving", "pruning", "final export")
OPTIONS = {
    "test_size": 8,
    "eval_steps": 4,
    "checkpointing_steps": 1,
    "keep_last_n_checkpoints": 2,
    "per_device_train_batch_size": 2,
    "num_proc": 1,
}


@dataclass
class Tally:
    """What the kills did."""

    kills: Counter[str] = field(default_factory=Counter)
    """By the stage that they met."""
    runs: int = 0
    """Finished runs, each compared with the unbroken one."""
    steps_lost: int = 0
    """Steps that had been logged, and were made again."""
    bytes_lost: int = 0
    """Of files that a kill left half-written, and that were thrown away."""

    def __str__(self) -> str:
        """As lines for people."""
        met = ", ".join(f"{stage} {self.kills[stage]}" for stage in STAGES if self.kills[stage])
        return "\n".join(
            [
                f"kills survived  {self.kills.total()} ({met})",
                f"runs finished   {self.runs}, each the same as the unbroken run",
                f"steps lost      {self.steps_lost} (made again from the last checkpoint)",
                f"bytes lost      {self.bytes_lost} (of files that were being written)",
            ]
        )


class Laboratory:
    """One unbroken run, and runs of the same command that are killed."""

    def __init__(self, root: Path, *, seed: int, num_pairs: int = 40) -> None:
        """Make the model and the data, and run unbroken.

        Args:
            root: an empty folder.
            seed: of the instants.
            num_pairs: of the dataset.
        """
        self.root = root
        self.random = random.Random(seed)
        self.tally = Tally()
        write_jsonl(root / "pairs.jsonl", make_pairs(num_pairs, seed=0))
        child = fork(lambda: tiny_settings(root))  # the tokenizer's threads stay out of the parent
        assert os.waitpid(child, 0)[1] == 0
        self.lengths = self._unbroken()

    def kill_and_finish(self, kills: int) -> None:
        """A new run, killed some times, finished, and compared.

        Args:
            kills: how often to try; one whose stage does not come again lets the run finish.
        """
        broken = self.root / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        for _ in range(kills):
            self._killed(broken)
        child = fork(lambda: self._train(broken))
        assert os.waitpid(child, 0)[1] == 0, f"{broken} does not finish"
        self._compare(broken)
        self.tally.runs += 1

    def _train(self, folder: Path) -> None:
        """`preftune train`, in the child."""
        from preftune.cli.main import main

        options = OPTIONS | {"output_dir": folder / "run", "cache_dir": folder / "cache"}
        settings = tiny_settings(self.root, **options)
        code = main(["train", *arguments(settings)])
        if code:
            raise SystemExit(code)

    def _unbroken(self) -> dict[str, list[float]]:
        """How long the unbroken run was in each stage, each time it was, in seconds."""
        folder = self.root / "unbroken"
        lengths: dict[str, list[float]] = {stage: [] for stage in STAGES}
        child = fork(lambda: self._train(folder))
        before, since = stage_of(folder), time.perf_counter()
        while not ended(child):
            stage, now = stage_of(folder), time.perf_counter()
            if stage != before:
                lengths[before].append(now - since)
                before, since = stage, now
        assert (folder / "run" / "final" / "model.safetensors").is_file()
        return lengths

    def _killed(self, folder: Path) -> None:
        """Run, and kill at an instant of a stage; a run that has none of it left finishes."""
        stage, visit = self.random.choice(STAGES), self.random.randint(1, 3)
        after = self.random.random() * self.random.choice(self.lengths[stage] or [0.0])
        child = fork(lambda: self._train(folder))
        before = ""
        while not ended(child):
            now = stage_of(folder)
            visit -= now == stage != before
            before = now
            if visit <= 0 or (now == stage and stage in ("tokenising", "reference")):
                time.sleep(after)
                break
        if ended(child):
            return
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.tally.kills[stage_of(folder)] += 1
        self.tally.steps_lost += steps_lost(folder / "run")
        self.tally.bytes_lost += sum(path.stat().st_size for path in half_written(folder))

    def _compare(self, broken: Path) -> None:
        unbroken = self.root / "unbroken"
        assert read_metrics(broken / "run") == read_metrics(unbroken / "run")
        for name in ("cache/reference", "run/final"):
            one, other = contents(unbroken / name), contents(broken / name)
            assert one.keys() == other.keys()
            # The model card tells the time.
            assert [k for k in one if one[k] != other[k] and k != "README.md"] == []
        left = [str(path.relative_to(broken)) for path in half_written(broken / "run")]
        assert left == []
        assert json.loads((broken / "run" / "run.json").read_text())["status"] == "finished"


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a child process; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_ENDED: set[int] = set()


def ended(child: int) -> bool:
    """Whether a child has ended, which must be well."""
    if child in _ENDED:
        return True
    pid, status = os.waitpid(child, os.WNOHANG)
    assert status == 0
    if pid:
        _ENDED.add(child)
    return bool(pid)


def stage_of(folder: Path) -> str:
    """What a run is at, from what lies on disk."""
    run, reference = folder / "run", folder / "cache" / "reference"
    checkpoints = names(run / "checkpoints")
    if (run / "final").exists() or (run / ".partial-final").exists():
        return "final export"
    if any(name.startswith(".partial-") for name in checkpoints):
        return "saving"
    if any(name.startswith(".deleted-") for name in checkpoints):
        return "pruning"
    if (run / "run.json").exists():
        return "training"
    return "reference" if names(reference) else "tokenising"


def names(folder: Path) -> list[str]:
    """What lies in a folder, if it is there."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def steps_lost(run: Path) -> int:
    """Steps logged after the last checkpoint."""
    if not (run / "metrics.jsonl").exists():
        return 0
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    saved = [
        int(name.removeprefix("step-")) for name in names(run / "checkpoints") if name[0] != "."
    ]
    return (json.loads(lines[-1])["step"] if lines else 0) - max(saved, default=0)


def half_written(folder: Path) -> list[Path]:
    """Files under a temporary name, or in a folder that has one."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file()
        and any(p.startswith(".") for p in path.relative_to(folder).parts)
        and path.suffix != ".lock"
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }
