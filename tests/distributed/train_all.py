"""Run by torchrun: one training after the other, so that processes start once.

    torchrun --nproc_per_node 2 train_all.py LIST.json [SCRIPT]

The list holds settings of runs. Where they have `cut`, a path and a step, the run's folder is made
from that run, as if it had been killed after that step. Then comes a script, if there is one.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from torch import distributed as dist

from preftune import ExperimentConfig, train
from preftune.distributed.runtime import leave_process_group
from tests.runs import pretend_unfinished


def main() -> None:
    """Train as the list says."""
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        cut = settings.pop("cut", None)
        if cut is not None:
            make_cut(settings, *cut)
        train(ExperimentConfig(**settings))
    if len(sys.argv) > 2:
        runpy.run_path(sys.argv[2])["main"]()
    leave_process_group()


def make_cut(settings: dict[str, Any], source: str, step: int) -> None:
    """Rank 0 makes the folder; the others wait."""
    if os.environ["RANK"] == "0":
        shutil.copytree(source, settings["output_dir"])
        pretend_unfinished(Path(settings["output_dir"]), step)
    if dist.is_initialized():  # alone there is nobody to wait for
        dist.barrier()


if __name__ == "__main__":
    main()
