"""Processes that build one reference store, some of them killed; run by test_store_processes.py.

One process imports torch and forks the others, so that each begins at once.

    python store_processes.py FOLDER SEED
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from preftune.batching.layout import Layout
from preftune.model.forward import PolicyModel
from preftune.reference.build import ReferenceLogps, ShardSize, reference_logps
from preftune.reference.store import ReferenceStore
from tests.examples import make_examples
from tests.tiny import tiny_model

SIZE = ShardSize(tokens=200, micro_batches=1)


def build(root: Path) -> ReferenceLogps:
    """One pass over the same rows."""
    return reference_logps(
        PolicyModel(tiny_model()),
        make_examples(60),
        ReferenceStore(root, "ns", {}),
        layout=Layout("concatenated"),
        device=torch.device("cpu"),
        shard_size=SIZE,
    )


def forked(work: Callable[[], int]) -> int:
    """The id of a new process that does `work` and exits with what it returns, at most 255."""
    child = os.fork()
    if child == 0:
        try:
            code = work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 255
        os._exit(code)
    return child


def exit_code(child: int) -> int:
    """Of a child, once it ends; minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(root: Path) -> dict[str, str]:
    """Shards by name, and what else lies beside them."""
    return {
        path.name: path.read_bytes().hex() if path.suffix in (".safetensors", ".plan") else ""
        for path in sorted((root / "reference" / "ns").iterdir())
    }


def together(root: Path) -> list[int]:
    """Answers that each of two processes computes which begin at the same time."""
    ready, start = os.pipe()

    def work() -> int:
        os.read(ready, 1)
        return build(root).num_computed

    children = [forked(work) for _ in range(2)]
    time.sleep(0.2)
    os.write(start, b"xx")
    return [exit_code(child) for child in children]


def killed(root: Path, rng: random.Random, longest: float) -> int:
    """How often a pass was killed before it was left alone."""
    kills = 0
    for _ in range(6):
        child = forked(lambda: build(root).num_computed)
        time.sleep(rng.uniform(0, longest / 3))
        os.kill(child, signal.SIGKILL)
        kills += exit_code(child) == -signal.SIGKILL
    assert exit_code(forked(lambda: build(root).num_computed)) != 255
    ReferenceStore(root, "ns", {})  # alone here, it removes what was left half-written
    return kills


def held(root: Path) -> list[int]:
    """What a process computes beside one that is stopped in a shard, and then killed."""
    store = ReferenceStore(root, "ns", {})
    holds, told = os.pipe()

    def stuck() -> int:
        compute = ReferenceStore.write_shard

        def never(self: ReferenceStore, path: Path, entries: object) -> None:
            if path.name.endswith("-00002.safetensors"):
                os.write(told, b"x")
                time.sleep(600)
            compute(self, path, entries)  # type: ignore[arg-type]

        ReferenceStore.write_shard = never  # type: ignore[method-assign, assignment]
        return build(root).num_computed

    first = forked(stuck)
    os.read(holds, 1)
    second = forked(lambda: build(root).num_computed)
    while len(list(store.folder.glob("*.safetensors"))) < len(STRAIGHT_SHARDS) - 1:
        time.sleep(0.02)
    time.sleep(0.5)
    waits = os.waitpid(second, os.WNOHANG) == (0, 0)
    os.kill(first, signal.SIGKILL)
    return [int(waits), exit_code(first), exit_code(second)]


if __name__ == "__main__":
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    began = time.monotonic()
    STRAIGHT_NUMBER = exit_code(forked(lambda: build(folder / "straight").num_computed))
    seconds = time.monotonic() - began
    STRAIGHT_SHARDS = [n for n in content(folder / "straight") if n.endswith(".safetensors")]
    outcome = {
        "answers": STRAIGHT_NUMBER,
        "together": [together(folder / f"together-{n}") for n in range(3)],
        "kills": [
            killed(folder / f"killed-{n}", random.Random(seed + n), seconds) for n in range(3)
        ],
        "held": held(folder / "held"),
        "stores": {root.name: content(root) for root in sorted(folder.iterdir())},
    }
    print(json.dumps(outcome))
