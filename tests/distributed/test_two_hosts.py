"""`preftune launch hosts` over two network namespaces that a veth pair joins, as two machines."""

import os
import shutil
import subprocess
import time

import pytest

from tests.launches import finish, settings_of, start, weights
from tests.runs import read_metrics

HOSTS = ("10.203.77.1", "10.203.77.2")


def _ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def _can_make_namespaces():
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = _ip("netns", "add", "preftune-probe")
    return made and _ip("netns", "del", "preftune-probe")


pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not _can_make_namespaces(), reason="needs root and ip netns"),
]


@pytest.fixture
def network():
    """Two namespaces, each with one end of a cable; their names, and that of the first end."""
    names = [f"preftune-{os.getpid()}-{n}" for n in (1, 2)]
    ends = [f"pf{os.getpid() % 1000000}{n}" for n in "ab"]
    try:
        for name in names:
            assert _ip("netns", "add", name)
        cable = ["add", ends[0], "netns", names[0], "type", "veth"]
        assert _ip("link", *cable, "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, HOSTS, strict=True):
            assert _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            assert _ip("-n", name, "link", "set", "lo", "up")
            assert _ip("-n", name, "link", "set", end, "up")
        yield names, ends[0]
    finally:
        for name in names:
            _ip("netns", "del", name)


def launch(names, settings):
    """The launchers of both hosts."""
    words = ["-m", "preftune", "launch", "hosts", "--hosts", *HOSTS, "--num_processes", "1"]
    words += ["--silence_seconds", "6", "--join_seconds", "8", "--end_seconds", "10", "--"]
    # The address of each tells it which of the hosts it is.
    return [start(words, settings, before=("ip", "netns", "exec", name)) for name in names]


def test_a_cut_cable_ends_both_sides_and_the_same_command_goes_on(network, tmp_path):
    names, end = network
    options = {"num_epochs": 20.0, "keep_last_n_checkpoints": None}
    unbroken = launch(names, settings_of(tmp_path, "unbroken", **options))
    for process in unbroken:
        code, said = finish(process)
        assert code == 0, said
    cut = settings_of(tmp_path, "cut", **options)
    first, second = launch(names, cut)
    step = tmp_path / "cut" / "checkpoints" / "step-00000003"
    deadline = time.monotonic() + 120
    while not step.exists():
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    assert _ip("-n", names[0], "link", "set", end, "down")
    began = time.monotonic()
    code, said = finish(first, 60)
    assert code == 1
    assert f"lost host 1 ({HOSTS[1]}): not a word for 6 s" in said
    assert f"{HOSTS[1]} did not come within 8 s" in said
    code, said = finish(second, 60)
    assert code == 1
    assert f"lost host 0 ({HOSTS[0]}): not a word for 6 s" in said
    assert f"host 0 ({HOSTS[0]}) did not come back" in said
    assert time.monotonic() - began < 60
    assert not (tmp_path / "cut" / "final").exists()
    assert _ip("-n", names[0], "link", "set", end, "up")
    for process in launch(names, cut):
        code, said = finish(process)
        assert code == 0, said
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "unbroken")
    assert weights(tmp_path / "cut") == weights(tmp_path / "unbroken")
