"""What holds for every test: no network, no shared cache, the repository root importable."""

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes says nothing on a machine that others use at the same time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Read by huggingface_hub and tokenizers when they are imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# `from tests.tiny import ...` under --import-mode=importlib, which leaves sys.path alone.
_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

_LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None, socket.gethostname()}


def _refuse_unless_loopback(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _LOOPBACK and not str(name).startswith("127."):
        raise OSError(f"tests may not reach the network, and this one asked for {name!r}")


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Any:
    """Let sockets reach this machine only."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, getaddrinfo = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def guarded(original: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple):  # a string is a Unix socket's path
                _refuse_unless_loopback(address[0])
            return original(self, address)

        return call

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_unless_loopback(host)
        return getaddrinfo(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give each test session cache folders of its own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PREFTUNE_CACHE", str(tmp_path_factory.mktemp("preftune-cache")))
    patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))  # read at its import
    yield
    patch.undo()
