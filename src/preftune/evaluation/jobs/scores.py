"""What jobs find, in one form: `results.json`, and a table of it.

    [{"job": "lm_eval", "task": "arc_easy", "metric": "acc", "higher_is_better": true,
      "base": {"value": 0.61, "stderr": 0.01, "file": "/.../results_....json"},
      "trained": {"value": 0.63, "stderr": 0.01, "file": "/.../results_....json"}}, ...]

`base`, `trained`, `stderr` and `higher_is_better` are null where there is none. Values are as the
job's own file has them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preftune.files import write_atomically

WIDTH = 80


@dataclass(frozen=True)
class Score:
    """One number of one model."""

    task: str
    metric: str
    value: float
    stderr: float | None
    file: str
    """That it was read from."""
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class Side:
    """A number of one of the two models."""

    value: float
    stderr: float | None
    file: str


@dataclass(frozen=True)
class Comparison:
    """One number of both models; a row of results.json."""

    job: str
    task: str
    metric: str
    higher_is_better: bool | None
    base: Side | None
    trained: Side | None


def compare(job: str, base: Iterable[Score], trained: Iterable[Score]) -> list[Comparison]:
    """Bring the numbers of two models together, by name of task; metrics in the job's order.

    Args:
        job: its name.
        base: of the model that was trained from; of two for a task and metric the last counts.
        trained: of the trained one.
    """
    sides = [{(s.task, s.metric): s for s in scores} for scores in (base, trained)]
    rows = []
    for key in sorted(dict.fromkeys([*sides[1], *sides[0]]), key=lambda key: key[0]):
        found = [side.get(key) for side in sides]
        known = next(score for score in reversed(found) if score is not None)
        both = [s and Side(s.value, s.stderr, s.file) for s in found]
        rows.append(Comparison(job, *key, known.higher_is_better, *both))
    return rows


def write_results(path: Path, rows: Sequence[Comparison]) -> None:
    """Write results.json, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False)
    write_atomically(path, text + "\n")


def read_results(path: Path) -> list[Comparison]:
    """Read results.json; nothing where there is none, or none that can be read."""
    try:
        return [_row(row) for row in json.loads(path.read_text("utf-8"))]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _row(row: Mapping[str, Any]) -> Comparison:
    sides = {key: row[key] and Side(**row[key]) for key in ("base", "trained")}
    return Comparison(**{**row, **sides})


def table(rows: Sequence[Comparison]) -> str:
    """The rows as text of at most 80 columns; a longer name of a task is cut in its middle."""
    numbers = [[_shown(row.base), _shown(row.trained), _difference(row)] for row in rows]
    heads = ["base", "trained", "difference"]
    widths = [max(len(line[i]) for line in [heads, *numbers]) for i in range(3)]
    room = WIDTH - sum(widths) - 6
    names = [_cut(f"{row.task}: {row.metric}", room) for row in rows]
    first = max(map(len, ["task: metric", *names]))
    return "\n".join(
        "  ".join([name.ljust(first), *(t.rjust(w) for t, w in zip(line, widths, strict=True))])
        for name, line in zip(["task: metric", *names], [heads, *numbers], strict=True)
    )


def _shown(side: Side | None) -> str:
    if side is None:
        return "-"
    return f"{side.value:.4g}" + ("" if side.stderr is None else f" ± {side.stderr:.2g}")


def _difference(row: Comparison) -> str:
    if row.base is None or row.trained is None:
        return "-"
    difference = row.trained.value - row.base.value
    worse = row.higher_is_better is not None and difference * (row.higher_is_better - 0.5) < 0
    return f"{difference:+.4g}" + (" (worse)" if worse else "")


def _cut(name: str, room: int) -> str:
    keep = max(room - 1, 8)
    return name if len(name) <= room else f"{name[: keep // 2]}…{name[-(keep - keep // 2) :]}"
