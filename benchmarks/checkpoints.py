"""How long checkpoints hold up training, and how long a restore takes against plain reading.

    python benchmarks/checkpoints.py [--layers 30] [--saves 10] [--tokens 128]

The state is that of SmolLM2-135M under AdamW: random weights, real moments, 1.6 GB. Held up is the
time inside the save, and the time that the next update then waits for the copy; between two saves
the first one comes to its end, as with checkpoints that are minutes apart.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import VOCABULARY, make_model

from preftune.config.training import TrainingConfig
from preftune.distributed.engine import TorchEngine
from preftune.training.checkpoint import snapshot, write_checkpoint
from preftune.training.generators import generator_tensors
from preftune.training.optimizer import make_optimizer
from preftune.training.restore import load_checkpoint
from preftune.training.saver import CheckpointSaver
from preftune.training.step import TrainState

CPU = torch.device("cpu")


class Training:
    """Steps on random tokens, with a stopwatch around what an update waits for."""

    def __init__(self, layers: int, tokens: int, *, in_background: bool) -> None:
        """Make the state, and its moments by one step.

        Args:
            layers: of the model.
            tokens: of a step.
            in_background: how it saves.
        """
        self.policy = make_model(layers)
        optimizer = make_optimizer(self.policy, TrainingConfig())
        self.engine = TorchEngine("one process", self.policy, optimizer, None)
        self.state = TrainState.at_start(self.engine, CPU)
        self.ids = torch.randint(VOCABULARY, (1, tokens))
        self.held_up = 0.0
        optimizer.register_step_pre_hook(lambda *_: self._note(-1))
        self.saver = CheckpointSaver(optimizer, CPU, in_background=in_background, say=print)
        optimizer.register_step_pre_hook(lambda *_: self._note(+1))
        self.step()

    def _note(self, sign: int) -> None:
        self.held_up += sign * time.perf_counter()

    def step(self) -> float:
        """One step; the CPU seconds that this thread took, whoever else was on the processor."""
        began = time.thread_time()
        self.policy.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.engine.update(skip=torch.zeros(()))
        self.state.step += 1
        return time.thread_time() - began

    def save(self, folder: Path) -> None:
        """Hand a checkpoint over."""
        extra = {"config": {}, "identity": {}, "metrics_offset": 0}
        content = snapshot(self.state, self.policy.model, {}, [generator_tensors(CPU)], extra)
        self.saver.save(content, lambda content: write_checkpoint(folder, content))

    def measure_saves(self, root: Path, saves: int) -> tuple[list[float], list[float], int]:
        """Seconds that each save holds training up, CPU seconds of steps beside, bytes of one."""
        held_up, beside, size = [], [], 0
        for number in range(saves + 1):
            folder = root / f"step-{number:08d}"
            self.held_up = 0.0
            began = time.perf_counter()
            self.save(folder)
            self.held_up += time.perf_counter() - began
            beside.append(self.step())
            self.saver.wait()
            held_up.append(self.held_up)
            size = sum(path.stat().st_size for path in folder.iterdir())
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
        return held_up[1:], beside[1:], size  # without the first, which takes the memory


def read_plainly(folder: Path, memory: memoryview) -> float:
    """Seconds that reading every file into memory takes, and nothing else."""
    began = time.perf_counter()
    for path in folder.iterdir():
        rest = memory
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(rest[: 1 << 20]):
                rest = rest[count:]
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_loads(training: Training, folder: Path, repeats: int) -> None:
    """Print restoring against reading, from the disk and from the page cache, taking turns."""

    def load() -> float:
        began = time.perf_counter()
        load_checkpoint(folder, training.state, training.policy.model, device=CPU)
        return time.perf_counter() - began

    largest = max(path.stat().st_size for path in folder.iterdir())
    memory = memoryview(bytearray(largest + (1 << 20)))
    ways: dict[str, Callable[[], float]] = {
        "reading": lambda: read_plainly(folder, memory),
        "restoring": load,
    }
    for where in ("disk", "page cache"):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats):
            # Whoever comes second may find the blocks in a cache below this machine's.
            for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
                if where == "disk":
                    forget(folder)
                seconds[name].append(way())
        reading, restoring = (statistics.median(seconds[name]) for name in ways)
        print(
            f"from the {where:10} reading {reading:6.2f} s, restoring {restoring:6.2f} s: "
            f"{restoring / reading:.2f} of reading",
            flush=True,
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    medians = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for way in ("waiting", "background"):
            training = Training(options.layers, options.tokens, in_background=way == "background")
            alone = statistics.median(training.step() for _ in range(3))
            held_up, beside, size = training.measure_saves(root, options.saves)
            medians[way] = statistics.median(held_up)
            print(
                f"{way:11} {size / 1e9:.2f} GB, {len(held_up)} saves: training held up "
                f"{medians[way]:.3f} s (median; {min(held_up):.3f} to {max(held_up):.3f}); "
                f"CPU of the step after a save {statistics.median(beside):.2f} s, of others "
                f"{alone:.2f} s",
                flush=True,
            )
        share = medians["background"] / medians["waiting"]
        print(f"background / waiting: {100 * share:.2f} %", flush=True)
        training.save(root / "step-00000001")
        training.saver.wait()
        measure_loads(training, root / "step-00000001", 6)


if __name__ == "__main__":
    main()
