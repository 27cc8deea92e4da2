"""`preftune report`."""

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from preftune.cli.options import options_or_help, wants_help
from preftune.config.report import ReportConfig
from preftune.errors import ConfigError

USAGE = "preftune report RUN [RUN...] [--output FILE]"
WHAT = (
    "Write the report of a run again: one HTML file with verdict, charts, samples, data and "
    "configuration, which asks for nothing over the network. Of several runs, one report that "
    "compares them. A RUN is the output_dir of a run, which may still be going on."
)


def run(argv: Sequence[str]) -> int:
    """Write a report.

    Args:
        argv: the words after `report`.
    """
    roots = list(takewhile(lambda word: not word.startswith("-"), argv))
    options = argv[len(roots) :]
    if not roots and not wants_help(argv):
        raise ConfigError(f"report needs a run first; write: {USAGE}")
    config = options_or_help(ReportConfig, options, USAGE, WHAT, allow_file=False)
    if config is None:
        return 0
    if len(roots) > 1 and config.output is None:
        raise ConfigError(
            f"report compares {len(roots)} runs, and nothing says where to write; give "
            "--output FILE.html"
        )
    from preftune.report.page import write_report

    print(write_report([Path(root).expanduser() for root in roots], config.output))
    return 0
