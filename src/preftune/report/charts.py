"""Which curves stand on which chart, and how many of their points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from preftune.report.runs import Curve, MetricName, RunRecord

MOST_NUMBERS = 150_000
"""On a page: about 8 bytes each, so some 1.2 MB, whatever the run's length."""
MOST_POINTS, LEAST_POINTS = 500, 60
"""Of one curve: about as many as a screen can show, and as a shape needs."""


@dataclass(frozen=True)
class ChartSpec:
    """A chart before it is known which of its curves exist."""

    key: str
    title: str
    metrics: tuple[str, ...]
    note: str
    unit: str = ""
    is_share: bool = False
    """Whether its values are from 0 to 1, and its axis too."""
    by_source: bool = False
    """Whether its curves are those of single sources of held-out rows."""


CHARTS = (
    ChartSpec("loss", "Loss", ("loss",), "The mean over the rows since the last point."),
    ChartSpec(
        "margins",
        "Reward margin",
        ("rewards/margins",),
        "Implicit reward of the chosen answer minus that of the rejected one. Above 0: they are "
        "told apart.",
    ),
    ChartSpec(
        "accuracy",
        "Accuracy",
        ("rewards/accuracies", "rewards/accuracies_length_matched"),
        "Share of rows on the right side. Length matched: pairs whose answers are about equally "
        "long.",
        is_share=True,
    ),
    ChartSpec(
        "rewards",
        "Implicit rewards",
        ("rewards/chosen", "rewards/rejected", "rewards/baseline"),
        "How far the policy prefers an answer over what the reference gave it.",
    ),
    ChartSpec(
        "logps",
        "Log-probs of the answers",
        ("logps/chosen", "logps/rejected"),
        "Of whole answers, so they jump with the lengths in a batch.",
        "nats",
    ),
    ChartSpec(
        "logratios",
        "Log-ratios to the reference",
        ("logratios/chosen", "logratios/rejected"),
        "Below 0: less likely than before training. Where chosen falls, too, probability goes to "
        "answers that are in neither side.",
        "nats",
    ),
    ChartSpec(
        "displaced",
        "Displaced chosen answers",
        ("logratios/displaced",),
        "Share of chosen answers that are less likely than under the reference.",
        is_share=True,
    ),
    ChartSpec(
        "kl",
        "KL divergence from the start",
        ("kl/forward",),
        "How far the policy has moved, on answers drawn from it before training.",
        "nats an answer",
    ),
    ChartSpec(
        "length",
        "Reward and length",
        ("rewards/length_correlation",),
        "Correlation over all held-out answers. Near 1 or -1 the policy has learnt length.",
    ),
    ChartSpec(
        "source_accuracy",
        "Accuracy by source",
        ("rewards/accuracies",),
        "Of held-out rows, by where they come from.",
        is_share=True,
        by_source=True,
    ),
    ChartSpec("perplexity", "Perplexity", ("perplexity",), "Of the answers' tokens."),
    ChartSpec(
        "grad_norm", "Gradient norm", ("grad_norm",), "Of the whole gradient, before clipping."
    ),
    ChartSpec("learning_rate", "Learning rate", ("learning_rate",), "Of the step."),
    ChartSpec(
        "throughput",
        "Throughput",
        ("perf/pairs_per_second", "perf/rows_per_second"),
        "Over all devices; without evaluation.",
        "a second",
    ),
    ChartSpec(
        "tokens",
        "Tokens",
        ("perf/tokens_per_second",),
        "Forwarded tokens, over all devices.",
        "a second",
    ),
    ChartSpec(
        "seconds", "Step time", ("perf/step_seconds",), "Mean since the last point.", "seconds"
    ),
    ChartSpec(
        "memory", "Peak memory", ("perf/peak_memory_gib",), "Most so far, of one process.", "GiB"
    ),
)
_WITHOUT_A_CHART = {"epoch", "num_tokens", "rewards/length_matched", "kl/forward_error"}
"""Metrics that only count, or say how far another can be relied on. The table has them."""
_SHORT = {
    "rewards/accuracies": "all",
    "rewards/accuracies_length_matched": "length matched",
    "perf/pairs_per_second": "pairs",
    "perf/rows_per_second": "rows",
}


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    curve: Curve
    run: int
    colour: int
    dashed: bool


@dataclass(frozen=True)
class Chart:
    """A chart with its curves."""

    spec: ChartSpec
    lines: list[Line] = field(default_factory=list)


def charts_of(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """The charts that there is something to show on.

    Of several runs a chart has one metric, and a colour is a run; of one run what belongs together
    is on one chart.

    Args:
        runs: one, or several to compare.
        names: of the runs.
    """
    specs = [*CHARTS, *_further(runs)]
    if len(runs) > 1:
        specs = [one for spec in specs for one in _split(spec, runs)]
    charts = [Chart(spec, _lines(spec, runs, names)) for spec in specs]
    return [chart for chart in charts if chart.lines]


def _further(runs: Sequence[RunRecord]) -> list[ChartSpec]:
    """Charts of metrics that have no place elsewhere, so that all that is logged is shown."""
    known = {metric for spec in CHARTS for metric in spec.metrics} | _WITHOUT_A_CHART
    found = [MetricName.of(name).metric for run in runs for name in run.curves]
    return [
        ChartSpec(f"more_{number}", metric, (metric,), "")
        for number, metric in enumerate(dict.fromkeys(found))
        if metric not in known
    ]


def _split(spec: ChartSpec, runs: Sequence[RunRecord]) -> list[ChartSpec]:
    there = {MetricName.of(name).metric for run in runs for name in run.curves}
    metrics = [metric for metric in spec.metrics if metric in there]
    if len(metrics) < 2:
        return [spec]
    return [
        replace(
            spec,
            key=spec.key if not number else f"{spec.key}_{number}",
            title=f"{spec.title}: {_metric_label(metric)}",
            metrics=(metric,),
        )
        for number, metric in enumerate(metrics)
    ]


def _lines(spec: ChartSpec, runs: Sequence[RunRecord], names: Sequence[str]) -> list[Line]:
    lines = []
    for number, run in enumerate(runs):
        for metric in spec.metrics:
            for full, curve in run.curves.items():
                name = MetricName.of(full)
                if name.metric != metric or bool(name.source) != spec.by_source:
                    continue
                several = len(runs) > 1
                label = _label(spec, name, names[number] if several else "")
                colour = number if several else _colour(spec, name, lines)
                lines.append(Line(label, curve, number, colour, name.held_out))
    return lines


def _label(spec: ChartSpec, name: MetricName, run: str) -> str:
    where = name.source or name.where
    if run and not name.held_out:
        return run
    metric = _metric_label(name.metric) if len(spec.metrics) > 1 and not run else ""
    if metric == "all":
        metric = ""
    if metric and not name.held_out:
        return metric
    return ", ".join(filter(None, [run, metric, where]))


def _metric_label(metric: str) -> str:
    return _SHORT.get(metric, metric.rsplit("/", 1)[-1].replace("_", " "))


def _colour(spec: ChartSpec, name: MetricName, before: Sequence[Line]) -> int:
    """The same for both sides of what is compared: training, and held out (dashed)."""
    if name.metric in ("rewards/chosen", "logps/chosen", "logratios/chosen"):
        return 0
    if name.metric in ("rewards/rejected", "logps/rejected", "logratios/rejected"):
        return 1
    return len(before)


# ---------------------------------------------------------------- points


def most_points(charts: Sequence[Chart]) -> int:
    """How many points a curve may have, so that the page stays small."""
    num_lines = sum(len(chart.lines) for chart in charts)
    return max(LEAST_POINTS, min(MOST_POINTS, MOST_NUMBERS // (4 * max(num_lines, 1))))


def points(curve: Curve, most: int) -> dict[str, list[Any]]:
    """At most so many points: of longer curves the mean of a stretch, its least and its most.

    Extremes stay, because a single bad step is what one looks for.

    Args:
        curve: any length.
        most: stretches of about equally many points.

    Returns:
        `s` steps and `v` values; of longer curves also `lo` and `hi`. None for what is no number.
    """
    if len(curve) <= most:
        return {"s": curve.steps, "v": [_rounded(value) for value in curve.values]}
    found: dict[str, list[Any]] = {"s": [], "v": [], "lo": [], "hi": []}
    edges = [len(curve) * i // most for i in range(most + 1)]
    for begin, end in pairwise(edges):
        values = [value for value in curve.values[begin:end] if math.isfinite(value)]
        found["s"].append(curve.steps[(begin + end - 1) // 2])
        found["v"].append(_rounded(math.fsum(values) / len(values)) if values else None)
        found["lo"].append(_rounded(min(values)) if values else None)
        found["hi"].append(_rounded(max(values)) if values else None)
    return found


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def drawn(charts: Sequence[Chart], most: int) -> dict[str, Any]:
    """What the page's script draws, as JSON takes it."""
    return {
        chart.spec.key: {
            "title": chart.spec.title,
            "share": chart.spec.is_share,
            "lines": [
                {
                    "label": line.label,
                    "run": line.run,
                    "colour": line.colour % 8,
                    "dashed": line.dashed,
                    **points(line.curve, most),
                }
                for line in chart.lines
            ],
        }
        for chart in charts
    }


def spread(chart: Chart, most: int) -> tuple[list[str], list[list[Any]]]:
    """A chart as a table: values at some of its steps, evenly from first to last.

    Args:
        chart: with at least one curve.
        most: rows.

    Returns:
        The heads of the columns, and the rows; None where a curve has no value.
    """
    steps = sorted({step for line in chart.lines for step in line.curve.steps})
    places = sorted({round(i * (len(steps) - 1) / max(most - 1, 1)) for i in range(most)})
    # Held-out curves have few points: all of them belong in the table, if they are few.
    few = {s for line in chart.lines if len(line.curve) <= most for s in line.curve.steps}
    shown = sorted({steps[place] for place in places if place < len(steps)} | few)
    values = [dict(zip(line.curve.steps, line.curve.values, strict=True)) for line in chart.lines]
    rows = [[step, *(value.get(step) for value in values)] for step in shown]
    return ["step", *(line.label for line in chart.lines)], rows
