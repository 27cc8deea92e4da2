"""The environment of a rank, and what this machine has."""

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ERROR_FILE = "PREFTUNE_ERROR_FILE"
"""Where a launched process writes why it ends, for the launcher to tell once."""

_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
# Accelerate believes these before WORLD_SIZE; srun and mpirun set them, for the launcher itself.
_OF_MPI = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_")
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Place:
    """Where the processes of a host stand among all of them."""

    host_rank: int
    first_rank: int
    world_size: int
    address: str
    """Where rank 0 is met."""
    port: int | None
    """None: not chosen yet."""
    interface: str | None = None
    """The network that leads to the other hosts."""


def rank_environment(place: Place, local_rank: int, num_processes: int) -> dict[str, str]:
    """The variables of one process, as torchrun sets them; none for a process alone.

    Args:
        place: of its host.
        local_rank: of the process on its host.
        num_processes: on its host.
    """
    own = {}
    if place.world_size > 1:
        own = {
            "RANK": str(place.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GROUP_RANK": str(place.host_rank),
            "MASTER_ADDR": place.address,
            "MASTER_PORT": "FREE_PORT" if place.port is None else str(place.port),
        }
        if place.interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
            own["GLOO_SOCKET_IFNAME"] = place.interface
    if "OMP_NUM_THREADS" not in os.environ:
        own["OMP_NUM_THREADS"] = str(max(1, num_cores() // num_processes))
    return own


def inherited() -> dict[str, str]:
    """The variables of this process that its ranks get, too."""
    dropped = (*_OWN, *_RENDEZVOUS, ERROR_FILE)
    return {
        key: value
        for key, value in os.environ.items()
        if key not in dropped and not key.startswith(_OF_MPI)
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """GPUs that processes with these variables see; 0 where none can be told."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on"):
        return 0
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len(list(devices.glob("nvidia[0-9]*")))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def interface_of(address: str) -> str | None:
    """The name of the network interface of this machine that has an IPv4 address; None without."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def is_this_machine(host: str) -> bool:
    """Whether a host's name is this machine's, or one of its addresses."""
    name = socket.gethostname()
    if host in (name, name.split(".")[0]):
        return True
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return False
    return any(interface_of(str(where[0])) is not None for *_, where in found)
