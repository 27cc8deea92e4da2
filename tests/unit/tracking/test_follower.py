"""A tracker that fails, hangs or comes late gets each step once, and no step waits for it."""

import json
import threading
import time
from pathlib import Path

import pytest

from preftune.tracking import follower
from preftune.tracking.follower import Followers
from preftune.tracking.tracker import TrackedRun


class Store:
    """What a server would hold."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict, list]] = []
        self.status: list[str] = []
        self.fails: list[Exception] = []
        """Raised by the next calls, one each."""
        self.took_it = False
        """Whether a call that fails had arrived all the same."""
        self.goes_on = threading.Event()
        self.goes_on.set()

    def open(self, run: TrackedRun) -> "FakeTracker":
        self.maybe_fail()
        return FakeTracker(self)

    def maybe_fail(self) -> None:
        if self.fails:
            raise self.fails.pop()


class FakeTracker:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.last_step = max((step for step, _, _ in store.steps), default=-1)

    def append(self, step, metrics, samples) -> None:
        self.store.goes_on.wait()
        if self.store.took_it:
            self.store.steps.append((step, metrics, samples))
        self.store.maybe_fail()
        if not self.store.took_it:
            self.store.steps.append((step, metrics, samples))

    def close(self, status) -> None:
        self.store.status.append(status)


class Files:
    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "metrics.jsonl", folder / "samples.jsonl"]

    def log(self, *steps: int) -> None:
        with self.paths[0].open("a") as file:
            file.writelines(json.dumps({"step": step, "loss": step / 2}) + "\n" for step in steps)

    def sample(self, step: int, **row) -> None:
        with self.paths[1].open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def follow(self, store: Store, told: list[str]) -> Followers:
        run = TrackedRun(self.paths[0].parent, "id", "name", "project", {})
        return Followers({"fake": store.open}, run, self.paths, told.append)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(follower, "FIRST_PAUSE", 0.001)
    return Files(tmp_path)


def steps_of(store: Store) -> list[tuple[int, float]]:
    return [(step, metrics["loss"]) for step, metrics, _ in store.steps]


def test_each_step_comes_once_in_order_with_its_samples(files: Files) -> None:
    store, told = Store(), []
    files.log(0, 2)
    followers = files.follow(store, told)
    files.sample(2, prompt="a", num_tokens={"policy": 1}, flags=["long", "cut"])
    files.sample(2, prompt="b", num_tokens={"policy": 2, "chosen": 3}, flags=[])
    files.sample(3, prompt="c", num_tokens={}, flags=[])
    files.log(4)
    followers.wake()
    followers.close("finished")
    rows = [
        {"prompt": "a", "num_tokens/policy": 1, "flags": "long, cut", "num_tokens/chosen": None},
        {"prompt": "b", "num_tokens/policy": 2, "flags": "", "num_tokens/chosen": 3},
    ]
    # The samples of step 2 came behind its metrics: woken in between, it had been told of step 2.
    assert [(step, metrics) for step, metrics, _ in store.steps] == [
        (0, {"loss": 0.0}),
        (2, {"loss": 1.0}),
        (3, {}),
        (4, {"loss": 2.0}),
    ]
    assert store.status == ["finished"]
    assert told == []
    again = Store()  # a store that was lost gets everything, samples with their step
    files.follow(again, told).close("finished")
    assert again.steps[1] == (2, {"loss": 1.0}, rows)
    assert again.steps[2] == (3, {}, [{"prompt": "c", "flags": ""}])


@pytest.mark.parametrize("took_it", [False, True])
def test_a_tracker_that_fails_is_tried_again(files: Files, took_it: bool) -> None:
    store, told = Store(), []
    store.took_it = took_it
    store.fails = [ValueError("no disk"), OSError("no\nserver"), OSError("no server")]
    files.log(1, 2, 3)
    followers = files.follow(store, told)
    while not store.steps or store.steps[-1][0] < 3:
        time.sleep(0.001)
    files.log(4)
    followers.wake()
    followers.close("interrupted")
    assert steps_of(store) == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert store.status[-1] == "interrupted"
    warning, over = told
    assert "fake does not take metrics (OSError: no server)" in warning
    assert over == "fake takes metrics again"


def test_a_tracker_that_always_fails_warns_once(files: Files) -> None:
    store, told = Store(), []
    store.fails = [OSError("unreachable")] * 10000
    files.log(1, 2)
    followers = files.follow(store, told)
    time.sleep(0.05)
    followers.close("finished")
    assert store.steps == []
    warning, lacking = told
    assert "OSError: unreachable" in warning
    assert lacking.startswith("fake did not get the metrics of every step; they are in metrics")


def test_one_that_hangs_holds_up_nobody(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "CLOSE_SECONDS", 0.1)
    slow, quick, told = Store(), Store(), []
    slow.goes_on.clear()
    run = TrackedRun(files.paths[0].parent, "id", "name", "project", {})
    openers = {"slow": slow.open, "quick": quick.open}
    followers = Followers(openers, run, files.paths, told.append)
    began = time.monotonic()
    for step in range(1000):
        files.log(step)
        followers.wake()
    followers.close("finished")
    assert time.monotonic() - began < 10  # it would hang for ever
    assert [step for step, _, _ in quick.steps] == list(range(1000))
    (lacking,) = told
    assert lacking.startswith("slow did not get the metrics of every step")
    slow.goes_on.set()
