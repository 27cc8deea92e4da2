"""The report as one HTML page that asks for nothing else, and may not."""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from preftune import __version__
from preftune.errors import ConfigError
from preftune.files import write_atomically
from preftune.report import tables
from preftune.report.charts import Chart, charts_of, drawn, most_points, spread
from preftune.report.runs import MetricName, RunRecord, read_run
from preftune.report.verdict import Evidence, Judgement, Verdict, judge

NAME = "report.html"
TABLE_ROWS = 11
"""Of the table beside a chart."""
_FOLDER = Path(__file__).parent


def write_report(roots: Sequence[Path], output: str | None = None) -> Path:
    """Write a report, whole or not at all.

    Args:
        roots: folders of runs.
        output: the file; None: `report.html` in the folder of a single run.

    Returns:
        Where it is.

    Raises:
        PreftuneError: a folder is not that of a run, or the file cannot be written there.
    """
    page = report_page([read_run(root) for root in roots])
    path = roots[0] / NAME if output is None else Path(output).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "a folder" if path.is_dir() else "in a folder that does not exist"
        raise ConfigError(f"output is {str(path)!r}, which is {what}; name a file to write")
    write_atomically(path, page)
    return path


def report_page(runs: Sequence[RunRecord]) -> str:
    """The whole page of one run, or of several beside each other.

    Everything that comes from data is escaped; the page's policy lets no other script run than its
    own, which it knows by its hash, and no request be made.
    """
    names = distinct_names(runs)
    charts = charts_of(runs, names)
    most = most_points(charts)
    judgements = [judge(evidence_of(run)) for run in runs]
    script, style = _text("charts.js"), _text("page.css")
    data = {"runs": names, "charts": drawn(charts, most)}
    return _template().render(
        runs=runs,
        names=names,
        charts=charts,
        tables={chart.spec.key: spread(chart, TABLE_ROWS) for chart in charts},
        judgements=judgements,
        anchors=[_anchors(one, charts) for one in judgements],
        shortened=max((_longest(chart) for chart in charts), default=0) > most,
        most=most,
        sections=tables,
        version=__version__,
        data=Markup(as_json(data)),
        script=Markup(script),
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; script-src {_hash(script)}; "
        f"style-src {_hash(style)}; base-uri 'none'; form-action 'none'",
    )


def evidence_of(run: RunRecord) -> Evidence:
    """What the checks of a run look at."""
    data = run.manifest.get("data") or {}
    prefix = tables.HELD_OUT
    return Evidence(
        run.curves,
        {
            key.removeprefix(prefix).removeprefix("/"): about.get("num_pairs") or 0
            for key, about in data.items()
            if key.startswith(prefix) and isinstance(about, dict)
        },
        run.manifest.get("global_batch_size") or 1,
        run.manifest.get("status") == "diverged",
    )


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The runs' names; where two are called the same, those of their folders; then the paths."""
    for named in (
        [run.name for run in runs],
        [run.root.resolve().name for run in runs],
        [str(run.root.resolve()) for run in runs],
    ):
        if len(set(named)) == len(named):
            return named
    raise ConfigError("a run is given twice; give each once")


def as_json(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _anchors(judgement: Judgement, charts: Sequence[Chart]) -> list[list[tuple[str, str]]]:
    """For each verdict the charts that say so: key and title."""
    return [_shown_on(verdict, charts) for verdict in judgement.verdicts]


def _shown_on(verdict: Verdict, charts: Sequence[Chart]) -> list[tuple[str, str]]:
    metrics = {MetricName.of(name).metric for name in verdict.metrics}
    return [
        (chart.spec.key, chart.spec.title)
        for chart in charts
        if metrics & set(chart.spec.metrics) and not chart.spec.by_source
    ]


def _longest(chart: Chart) -> int:
    return max(len(line.curve) for line in chart.lines)


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = tables.number
    return environment.from_string(_text("page.html.jinja"))


def try_report(root: Path, say: Callable[[str], None]) -> None:
    """Write the report of one run, if that can be done: its numbers are in other files, too.

    Args:
        root: the run's folder.
        say: tells people a sentence.
    """
    try:
        write_report([root])
    except Exception as error:  # whatever it is, nothing is lost
        say(
            f"report.html was not written ({type(error).__name__}: {error}); nothing else is "
            f"touched by that, and `preftune report {root}` tries again"
        )
