"""Free memory, as the machine and the container say it."""

from pathlib import Path

from preftune.training.host_memory import available_bytes

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {8 << 20} kB\n"}


def test_of_the_machine(tmp_path):
    assert available_bytes(write(tmp_path, MACHINE)) == 8 * GIB


def test_a_container_has_less_and_may_drop_its_page_cache(tmp_path):
    group = {
        "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
    }
    assert available_bytes(write(tmp_path, MACHINE | group)) == 2 * GIB


def test_a_container_without_a_limit(tmp_path):
    group = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}
    group |= {"sys/fs/cgroup/memory.stat": "inactive_file 0\n"}
    assert available_bytes(write(tmp_path, MACHINE | group)) == 8 * GIB


def test_the_older_kind_of_container(tmp_path):
    folder = "sys/fs/cgroup/memory"
    group = {
        f"{folder}/memory.limit_in_bytes": f"{2 * GIB}",
        f"{folder}/memory.usage_in_bytes": f"{GIB}",
        f"{folder}/memory.stat": "cache 0\ntotal_inactive_file 512\n",
    }
    assert available_bytes(write(tmp_path, MACHINE | group)) == GIB + 512


def test_nothing_is_known_elsewhere(tmp_path):
    assert available_bytes(tmp_path) is None
