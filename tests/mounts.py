"""File systems of a test's own, in a mount namespace: rights mean nothing to root."""

import os
import shutil
import subprocess

IN_A_NAMESPACE = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
"""Put before a command that mounts; what it mounts is gone when it ends."""


def can_mount() -> bool:
    """Whether this process may mount a tmpfs for itself."""
    if shutil.which("unshare") is None:
        return False
    probe = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
