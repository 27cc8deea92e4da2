"""What evaluation has found during a run: the first and the last of it."""

import json
from pathlib import Path
from typing import Any

PREFIX = "eval/"


def held_out_results(metrics: Path) -> list[dict[str, Any]]:
    """The first and the last evaluation in a `metrics.jsonl`; one where there was one, or none.

    Args:
        metrics: the file, which need not exist.

    Returns:
        `step` and the metrics under `eval/` of each.
    """
    first = last = None
    if metrics.is_file():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                if f'"{PREFIX}' in line:
                    first, last = first or line, line
    lines = [line for line in dict.fromkeys((first, last)) if line is not None]
    return [
        {k: v for k, v in json.loads(line).items() if k == "step" or k.startswith(PREFIX)}
        for line in lines
    ]
