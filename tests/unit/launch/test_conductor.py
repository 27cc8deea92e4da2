"""What the launcher does when processes end: with processes of a line or two, without torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from preftune.config.experiment import ExperimentConfig
from preftune.launch.conductor import Conductor, Plan, Signals
from preftune.launch.link import listen
from preftune.launch.member import Member
from preftune.launch.program import Program

CONFIG = ExperimentConfig(model_name_or_path="m", dataset_name="d")
START = """
import json, os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ.get("RANK", 0)), Path(sys.argv[1])
attempt = len(list(folder.glob(f"started-{rank}-*")))
(folder / f"started-{rank}-{attempt}").write_text(f"{os.getpid()} {os.environ.get('WORLD_SIZE')}")
def say(text, kind):
    Path(os.environ["PREFTUNE_ERROR_FILE"]).write_text(json.dumps({"text": text, "kind": kind}))
"""


@dataclass(frozen=True)
class Script(Program):
    """Lines of Python that each rank runs instead of preftune."""

    lines: str = ""
    folder: str = ""

    @property
    def command(self):
        return [sys.executable, "-S", "-c", START + self.lines, self.folder]

    def again(self):
        return self


def conduct(folder, lines, *, signals=None, **patience):
    """The exit code, and what was said."""
    said = []
    plan = Plan(Script((), CONFIG, lines, str(folder)), 2, ("127.0.0.1",), **patience)
    conductor = Conductor(
        plan, signals or Signals(), lambda text, as_it_is=False: said.append(text), None
    )
    try:
        return conductor.run(), said
    finally:
        conductor.close()


def starts(folder, rank):
    return len(list(folder.glob(f"started-{rank}-*")))


def test_processes_that_finish_are_started_once(tmp_path):
    assert conduct(tmp_path, "") == (0, [])
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 1


@pytest.mark.parametrize("code", [2, 3, 75])
def test_what_ends_a_run_for_good_is_the_exit_code_and_said_once(tmp_path, code):
    lines = f"say('preftune: error: so it is', 'DataError'); sys.exit({code})"
    assert conduct(tmp_path, lines) == (code, ["preftune: error: so it is"])
    assert starts(tmp_path, 0) == 1


def test_a_killed_process_ends_the_others_and_all_start_again(tmp_path):
    lines = """
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    say("preftune: error: rank 0 has lost rank 1", "PeerLost"); sys.exit(1)
"""
    code, said = conduct(tmp_path, lines)
    assert code == 0
    assert "rank 1 was killed by SIGKILL; ending the others" in said
    assert "preftune: error: rank 0 has lost rank 1" in said
    assert said[-1] == "restart 1 of 3, from the last checkpoint"
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 2


def test_restarts_are_counted(tmp_path):
    lines = "os.kill(os.getpid(), signal.SIGKILL)"
    code, said = conduct(tmp_path, lines, max_restarts=1)
    assert code == 1
    assert said[-1] == "max_restarts is used up"
    assert starts(tmp_path, 0) == 2


def test_the_same_error_twice_is_not_tried_again(tmp_path):
    lines = "say('ValueError: a fault', 'ValueError'); sys.exit(1)"
    code, said = conduct(tmp_path, lines)
    assert code == 1
    assert said[-1] == "it ended with the same error as before its restart"
    assert starts(tmp_path, 0) == 2


def test_one_that_hangs_is_ended_in_time(tmp_path):
    """Not by SIGTERM, which a rank in a collective does not see."""
    lines = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    time.sleep(60)
while not list(folder.glob("started-0-*")):
    time.sleep(0.01)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    began = time.monotonic()
    code, _ = conduct(tmp_path, lines, max_restarts=0, end_seconds=1.5)
    assert code == 1
    assert 1.5 < time.monotonic() - began < 15
    pid = int((tmp_path / "started-0-0").read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_wrong_input_on_one_rank_is_not_a_lost_rank(tmp_path):
    lines = """
if rank == 0:
    say("preftune: error: rank 0 has lost rank 1", "PeerLost"); sys.exit(1)
time.sleep(0.3)
say("preftune: error: no such file", "DataError"); sys.exit(2)
"""
    code, said = conduct(tmp_path, lines)
    assert code == 2
    assert said == [
        "rank 1:",
        "preftune: error: no such file",
        "rank 0:",
        "preftune: error: rank 0 has lost rank 1",
    ]
    assert starts(tmp_path, 0) == 1


@pytest.mark.parametrize("code", [75, 1])
def test_a_signal_reaches_the_processes_and_nothing_starts_again(tmp_path, code):
    lines = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
(folder / f"ready-{{rank}}").touch()
time.sleep(60)
"""
    signals = Signals()

    def ask():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        signals.waiting.append(signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert conduct(tmp_path, lines, signals=signals)[0] == code
    thread.join()
    assert starts(tmp_path, 0) == 1


# ---------------------------------------------------------------- several hosts
class Hosts:
    """Launchers of hosts that are all this machine, each in a thread."""

    def __init__(self, folder, lines, number=2, **patience):
        hosts = [f"127.0.0.{rank + 1}" for rank in range(number)]
        quick = {"join_seconds": 20.0, "silence_seconds": 5.0, "end_seconds": 1.0}
        self.said = {rank: [] for rank in range(number)}
        self.codes = {}
        self.listener = listen(0)
        self.port = self.listener.getsockname()[1]
        self.plan = Plan(Script((), CONFIG, lines, str(folder)), 1, hosts, **quick | patience)
        self.launchers = {0: Conductor(self.plan, Signals(), self._say(0), self.listener)}
        for rank in range(1, number):
            self.launchers[rank] = self.member(rank, self.plan)

    def member(self, rank, plan):
        return Member(plan, rank, self.port, Signals(), self._say(rank))

    def run(self, *ranks):
        def work(rank):
            self.codes[rank] = self.launchers[rank].run()
            self.launchers[rank].close()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        self.listener.close()
        return self.codes

    def _say(self, rank):
        return lambda text, as_it_is=False: self.said[rank].append(text)


def test_hosts_meet_and_a_lost_rank_restarts_all(tmp_path):
    lines = """
assert os.environ["WORLD_SIZE"] == "2"
while len(list(folder.glob(f"started-*-{attempt}"))) < 2:
    time.sleep(0.01)
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == 0:
    time.sleep(60)
"""
    hosts = Hosts(tmp_path, lines)
    assert hosts.run(0, 1) == {0: 0, 1: 0}
    lost = "rank 1 on 127.0.0.2 was killed by SIGKILL"
    assert hosts.said[0] == [
        f"{lost}; ending the others",
        "restart 1 of 3, from the last checkpoint",
    ]
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 2


def test_every_host_ends_with_the_code_of_the_run(tmp_path):
    lines = "say('preftune: error: no such file', 'DataError'); sys.exit(2 * rank)"
    hosts = Hosts(tmp_path, lines)
    assert hosts.run(0, 1) == {0: 2, 1: 2}
    assert "preftune: error: no such file" in hosts.said[0]


def test_hosts_that_launch_another_command_end_at_once(tmp_path):
    hosts = Hosts(tmp_path, "")
    other = ExperimentConfig(model_name_or_path="m", dataset_name="d", beta=0.3)
    hosts.launchers[1] = hosts.member(1, Plan(Script((), other), 1, hosts.plan.hosts))
    assert hosts.run(0, 1) == {0: 2, 1: 2}
    for said in hosts.said.values():
        assert said[-1].startswith("host 1 (127.0.0.2, 127.0.0.1) launches with another command")
    assert starts(tmp_path, 0) == 0


def test_a_host_that_does_not_come_is_named(tmp_path):
    hosts = Hosts(tmp_path, "", join_seconds=1.5)
    assert hosts.run(0) == {0: 1}
    assert hosts.said[0][-1].startswith("127.0.0.2 did not come within 1.5 s")
    hosts = Hosts(tmp_path, "", join_seconds=1.5)
    hosts.listener.close()
    assert hosts.run(1) == {1: 1}
    assert hosts.said[1] == [
        f"host 0 (127.0.0.1) cannot be reached at port {hosts.port} within 1.5 s: see that the "
        "same command runs there"
    ]


def test_fewer_hosts_go_on_after_one_is_lost(tmp_path):
    """Its launcher is closed, as if its machine had gone."""
    lines = """
size = os.environ.get("WORLD_SIZE")
while size == "2":
    time.sleep(0.01)
"""
    hosts = Hosts(tmp_path, lines, join_seconds=2.0, min_hosts=1)

    def pull():
        while starts(tmp_path, 1) < 1:
            time.sleep(0.01)
        hosts.launchers[1]._signals.stopping = True
        hosts.launchers[1]._link.close()

    thread = threading.Thread(target=pull)
    thread.start()
    assert hosts.run(0, 1) == {0: 0, 1: 1}
    thread.join()
    assert hosts.said[0] == [
        "lost host 1 (127.0.0.2, 127.0.0.1): its launcher has gone; ending the others",
        "restart 1 of 3, from the last checkpoint",
        "waiting for 127.0.0.2",
        "127.0.0.2 did not come within 2 s: going on without",
    ]
    assert (tmp_path / "started-0-1").read_text().split()[1] == "None"
    assert "lost host 0 (127.0.0.1): its launcher has gone" in hosts.said[1][0]


def test_a_launcher_that_is_killed_takes_its_processes_along(tmp_path):
    files = [tmp_path / f"started-{rank}-0" for rank in (0, 1)]
    program = (
        "import sys, time\n"
        "from tests.unit.launch.test_conductor import *\n"
        f"conduct(Path_({str(tmp_path)!r}), \"(folder / 'ready').touch(); time.sleep(60)\")\n"
    ).replace("Path_", "__import__('pathlib').Path")
    launcher = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not all(file.exists() and file.read_text().split() for file in files):
            assert launcher.poll() is None
            time.sleep(0.02)
    finally:
        launcher.kill()
        launcher.wait()
    pids = [int(file.read_text().split()[0]) for file in files]
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().split()[2] != "Z"
    except FileNotFoundError:
        return False
