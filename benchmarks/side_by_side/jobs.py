"""Running a function of this package in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES_SHOWN = 12
HEADER = "\n===== "


class JobFailed(Exception):
    """The process ended without a result; the text says how."""


def run_job(function: str, arguments: dict[str, Any], *, threads: int, log: Path) -> dict[str, Any]:
    """Call `module:function` of this package with keyword arguments, in a new process.

    Args:
        function: as in `trl_side:train`.
        arguments: what JSON can hold.
        threads: of the process's matrix products.
        log: gets what the process prints.

    Returns:
        What the function returned.

    Raises:
        JobFailed: it raised, or was killed.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(_search_path()),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        asked.write_text(json.dumps({"function": function, "arguments": arguments}))
        command = [sys.executable, "-m", f"{__package__}.worker", str(asked), str(answer)]
        with log.open("a") as output:
            print(f"{HEADER}{function} {arguments}", file=output, flush=True)
            process = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            )
        if process.returncode == 0:
            return json.loads(answer.read_text())
    raise JobFailed(_why(process.returncode, log))


def _search_path() -> list[str]:
    # The folder from which this package was imported, under whatever name.
    above = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]
    earlier = os.environ.get("PYTHONPATH")
    return [str(above), str(ROOT / "src"), *([earlier] if earlier else [])]


def _why(code: int, log: Path) -> str:
    if code == -9:
        return "killed, most likely for want of memory"
    *_, last = log.read_text(errors="replace").rpartition(HEADER)
    lines = [line for line in last.splitlines()[1:] if line.strip()]
    return f"exit code {code}; the end of {log}:\n  " + "\n  ".join(lines[-LOG_LINES_SHOWN:])
