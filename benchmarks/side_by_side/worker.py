"""The process of one job: reads it, runs it, writes the result."""

import importlib
import json
import sys
import warnings
from pathlib import Path


def main() -> None:
    """Run the job that the first argument names, and write its result to the second."""
    # Should memory run out, this process is the one to go, not a neighbour.
    Path("/proc/self/oom_score_adj").write_text("1000")
    warnings.filterwarnings("ignore")
    asked, answer = (Path(word) for word in sys.argv[1:])
    job = json.loads(asked.read_text())
    module, _, name = job["function"].partition(":")
    function = getattr(importlib.import_module(f".{module}", __package__), name)
    answer.write_text(json.dumps(function(**job["arguments"])))


if __name__ == "__main__":
    main()
