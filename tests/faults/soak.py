"""Kill runs at random instants, again and again.

    python -m tests.faults.soak --kills 50

Each run is killed one to three times with SIGKILL while it tokenises, scores the reference, trains,
saves, prunes or exports, and then finished by the same command. Its metrics, its reference store
and its final weights must be those of the unbroken run.
"""

import argparse
import os
import tempfile
from pathlib import Path


def main() -> None:
    """Kill, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # One thread: a forked child cannot use the threads of its parent.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import preftune.recipes.train  # noqa: F401  # once, for all children
    from tests.faults.kills import Laboratory

    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(Path(folder), seed=options.seed)
        while (done := laboratory.tally.kills.total()) < options.kills:
            laboratory.kill_and_finish(min(laboratory.random.randint(1, 3), options.kills - done))
            print(f"{laboratory.tally.kills.total()}/{options.kills} kills", flush=True)
        print(laboratory.tally)


if __name__ == "__main__":
    main()
