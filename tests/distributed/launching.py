"""`preftune launch` whose ranks kill themselves, each once: `kill -9` in the middle of something.

    python tests/distributed/launching.py MARKS local --num_processes 2 -- train ...

MARKS is a folder that remembers which of the kills have been.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def launch(marks: str, words: list[str]) -> int:
    """Launch, with this file in the place of `python -m preftune`."""
    from preftune.cli.main import main
    from preftune.launch.program import Program

    def command(self: Program) -> list[str]:
        return [sys.executable, __file__, "--rank", marks, *self.words]

    Program.command = property(command)  # pyright: ignore
    return main(["launch", *words])


def rank(marks: str, words: list[str]) -> int:
    """One of the processes."""
    from preftune.cli.main import main
    from preftune.distributed.engine import TorchEngine
    from preftune.reference.store import ReferenceStore
    from preftune.training import checkpoint

    with (Path(marks) / "starts").open("a") as file:
        file.write(f"{time.time()}\n")
    die_in(marks, "reference", ReferenceStore, "write_shard", calls=1)
    if os.environ["RANK"] == "1":
        die_in(marks, "step", TorchEngine, "backward", calls=4)
    if (Path(marks) / "step").exists():  # else both may come at once, and one restart do for two
        die_in(marks, "save", checkpoint, "write_manifest", calls=2)
    return main(words)


def die_in(marks: str, name: str, owner: Any, function: str, calls: int) -> None:
    """Have this process killed in a call of a function, unless some process has been before."""
    mark, before, counted = Path(marks) / name, getattr(owner, function), []

    def killed(*args: Any, **kwargs: Any) -> Any:
        counted.append(None)
        if len(counted) == calls and not mark.exists():
            mark.write_text(f"{time.time()}")
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*args, **kwargs)

    setattr(owner, function, killed)


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        sys.exit(rank(sys.argv[2], sys.argv[3:]))
    sys.exit(launch(sys.argv[1], sys.argv[2:]))
