"""The evaluation as a job of Slurm, which runs `preftune evaluate` on its host."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

_SCRIPT = """\
#!/bin/bash
{directives}

set -eu
cd {folder}
exec {command}
"""


def slurm_script(words: Sequence[str], options: Sequence[str], log: Path) -> str:
    """The batch script.

    Args:
        words: of `preftune evaluate`; run by this Python, which the host must have at the same
            path, in this folder.
        options: of sbatch.
        log: the file for what the job says.
    """
    directives = ["--job-name=preftune-evaluate", f"--output={log}", *options]
    return _SCRIPT.format(
        directives="\n".join(f"#SBATCH {directive}" for directive in directives),
        folder=shlex.quote(str(Path.cwd())),
        command=shlex.join([sys.executable, "-m", "preftune", "evaluate", *words]),
    )
