"""Run by train_all.py after its list: the pipeline of the file chain.yaml beside the list."""

import sys
from pathlib import Path

from preftune.config.pipeline import read_pipeline
from preftune.recipes.pipeline import run_pipeline


def main() -> None:
    """Run it."""
    run_pipeline(read_pipeline(str(Path(sys.argv[1]).with_name("chain.yaml"))))
