"""The report as one HTML page that needs nothing else: no script, no other file."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from preftune import __version__
from preftune.data.inspection.report import Report
from preftune.data.inspection.shown import visible
from preftune.data.inspection.terminal import is_numeric

MOST_DROPPED = 1000
_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def report_page(report: Report) -> str:
    """The whole page; everything that comes from the data is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    environment.filters["blanks"] = lambda text: visible(text).replace(" ", "·")
    environment.filters["is_numeric"] = is_numeric
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, version=__version__, most_dropped=MOST_DROPPED)
