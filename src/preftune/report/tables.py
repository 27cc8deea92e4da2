"""The report's tables and sentences, as plain values for the page."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from preftune.report.runs import Curve, RunRecord, unit_of

MOST_DROPPED = 200
"""Dropped rows that are shown one by one."""
MOST_PROMPTS, MOST_CHARACTERS = 24, 6000
"""Sampled prompts, and characters of one text: a page is read, and shall stay small."""
EARLIER = 4
"""Answers before the last ones that are kept for each prompt."""
SLOWEST = 8
HELD_OUT = "held_out"


def number(value: Any) -> str:
    """A number for people; what is none as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value == int(value) if math.isfinite(value) else False):
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


# ---------------------------------------------------------------- what was done


def sentence(run: RunRecord) -> str:
    """What was trained on what, in a sentence."""
    config, manifest = run.config, run.manifest
    model = str(config.get("model_name_or_path", "a model")).rstrip("/").rsplit("/", 1)[-1]
    about, data = manifest.get("model") or {}, manifest.get("data") or {}
    total, trained = about.get("parameters"), about.get("trainable_parameters")
    if total and trained:
        share = "all" if trained == total else f"{number(trained)}"
        model += f" ({number(total)} parameters, {share} trained)"
    train = data.get("train") or {}
    unit = unit_of(run.curves)
    where = str(train.get("name", "")).rstrip("/").rsplit("/", 1)[-1]
    steps, batch = manifest.get("steps"), manifest.get("global_batch_size")
    text = f"{model}, trained with {_method(config)} on {number(train.get('num_pairs'))} {unit}"
    text += f" of {where}" if where else ""
    done = run.last_step
    if steps and batch:
        of = f"{number(done)} of {number(steps)}" if done != steps else number(steps)
        text += f": {of} steps of {number(batch)} each"
    if manifest.get("seconds"):
        text += f", {duration(manifest['seconds'])}"
    return f"{text}, on {_device(manifest)}."


def _method(config: Mapping[str, Any]) -> str:
    if config.get("stage") == "sft":
        return "supervised fine-tuning"
    losses = config.get("loss_type", "dpo")
    name = " + ".join(losses) if isinstance(losses, list) else str(losses)
    beta = config.get("beta")
    return f"{name} (beta {beta:g})" if isinstance(beta, int | float) else name


def _device(manifest: Mapping[str, Any]) -> str:
    world = manifest.get("world_size") or 1
    device = str(manifest.get("device", "an unknown device"))
    return f"{world} × {device.split(':')[0]}" if world > 1 else device


def cards(run: RunRecord) -> list[tuple[str, str]]:
    """The few numbers that are looked for first, each with its name."""
    found = [("status", str(run.manifest.get("status", "unknown")))]
    wanted = (
        ("held-out accuracy", "eval/rewards/accuracies", "{:.1%}"),
        ("held-out loss", "eval/loss", "{:.4g}"),
        ("training accuracy", "rewards/accuracies", "{:.1%}"),
        ("training margin", "rewards/margins", "{:.3g}"),
        ("training loss", "loss", "{:.4g}"),
        ("KL from start", "eval/kl/forward", "{:.3g} nats"),
        ("pairs a second", "perf/pairs_per_second", "{:.3g}"),
        ("rows a second", "perf/rows_per_second", "{:.3g}"),
        ("peak memory", "perf/peak_memory_gib", "{:.3g} GiB"),
    )
    for name, metric, form in wanted:
        curve = run.curves.get(metric, Curve()).finite()
        if len(curve):
            found.append((name, form.format(curve.values[-1]).replace(".0%", "%")))
    return found


# ---------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Table:
    """Heads of columns, and rows of cells."""

    heads: list[str]
    rows: list[list[Any]]
    note: str = ""


def all_metrics(run: RunRecord) -> Table:
    """First, last, least and most of every metric."""
    rows = []
    for name, curve in run.curves.items():
        known = curve.finite()
        row = [name, *([None] * 4), len(curve)]
        if len(known):
            least, most = min(known.values), max(known.values)
            row[1:5] = [
                number(known.values[0]),
                number(known.values[-1]),
                f"{number(least)} (step {known.steps[known.values.index(least)]})",
                f"{number(most)} (step {known.steps[known.values.index(most)]})",
            ]
        rows.append(row)
    return Table(["metric", "first", "last", "least", "most", "points"], rows)


def last_metrics(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """The last value of every metric, a column a run."""
    metrics = dict.fromkeys(name for run in runs for name in run.curves)
    rows = []
    for name in metrics:
        curves = [run.curves.get(name, Curve()).finite() for run in runs]
        rows.append([name, *(number(c.values[-1]) if len(c) else None for c in curves)])
    return Table(["metric", *names], rows)


def slowest(run: RunRecord) -> Table | None:
    """The stretches of steps that took longest; None without timings."""
    curve = run.curves.get("perf/step_seconds", Curve()).finite()
    tokens = run.curves.get("num_tokens", Curve())
    if len(curve) < 2:
        return None
    usual = statistics.median(curve.values)
    counted = dict(zip(tokens.steps, tokens.values, strict=True))
    rows = []
    order = sorted(range(len(curve)), key=lambda i: -curve.values[i])[:SLOWEST]
    for place in order:
        last, first = curve.steps[place], curve.steps[place - 1] + 1 if place else 1
        took = curve.values[place]
        new = None
        if last in counted and (place == 0 or first - 1 in counted):
            new = (counted[last] - counted.get(first - 1, 0.0)) / (last - first + 1)
        rows.append(
            [
                str(last) if first >= last else f"{first}–{last}",
                number(took),
                f"{took / usual:.2f}" if usual else None,
                None if new is None else f"{new:,.0f}",
            ]
        )
    note = (
        f"The median is {number(usual)} s a step. A mean over the steps of a line, without "
        "evaluation and sampling."
    )
    return Table(["steps", "seconds a step", "times the median", "tokens a step"], rows, note)


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class DataSet:
    """What became of one dataset's rows."""

    title: str
    name: str
    counts: Table
    lengths: Table | None
    sources: Table | None
    dropped: list[list[Any]]
    num_dropped_rows: int


def datasets(run: RunRecord) -> list[DataSet]:
    """Training rows first, then held-out ones."""
    data = run.manifest.get("data") or {}
    return [_dataset(key, about) for key, about in data.items() if isinstance(about, Mapping)]


def _dataset(key: str, about: Mapping[str, Any]) -> DataSet:
    label = key.removeprefix(HELD_OUT).strip("/") if key.startswith(HELD_OUT) else ""
    title = "Training rows" if key == "train" else f"Held-out rows {label}".rstrip()
    lengths = about.get("num_tokens") or {}
    heads = ["tokens", *next(iter(lengths.values()), {})]
    sources = [_counts(one) for one in about.get("sources") or []]
    dropped = list(about.get("dropped_rows") or [])
    return DataSet(
        title,
        str(about.get("name", "")),
        Table(list(_counts(about)), [list(_counts(about).values())]),
        Table(heads, [[k, *map(number, v.values())] for k, v in lengths.items()])
        if lengths
        else None,
        Table(list(sources[0]), [list(one.values()) for one in sources])
        if len(sources) > 1
        else None,
        dropped[:MOST_DROPPED],
        len(dropped),
    )


def _counts(about: Mapping[str, Any]) -> dict[str, str]:
    dropped = about.get("dropped") or {}
    reasons = ", ".join(f"{number(count)} {reason}" for reason, count in dropped.items())
    found = {}
    if "amount" in about:
        found["source"] = str(about.get("name"))
    found |= {
        "read": number(about.get("read")),
        "kept": number(about.get("kept")),
        "dropped": reasons or "0",
        "truncated": number(about.get("truncated")),
        "not drawn": number(about.get("not_drawn")),
    }
    if "amount" in about:
        return found | {"in the mix": number(about.get("drawn"))}
    return found | {"used": number(about.get("num_pairs"))}


# ---------------------------------------------------------------- answers


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    who: str
    text: str
    facts: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt with answers side by side."""

    title: str
    prompt: str
    answers: list[Answer]
    earlier: list[Answer] = field(default_factory=list)


def samples(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Sample]:
    """Answers to the same prompts: to be learnt, before training, and of each run at its end."""
    asked: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for place, run in enumerate(runs):
        for row in run.samples:
            key = (str(row.get("row_id")), str(row.get("prompt")))
            of = asked.setdefault(key, [[] for _ in runs])
            of[place].append(row)
    return [
        _sample(row_id, prompt, by_run, names)
        for (row_id, prompt), by_run in list(asked.items())[:MOST_PROMPTS]
    ]


def _sample(
    row_id: str, prompt: str, by_run: Sequence[list[dict[str, Any]]], names: Sequence[str]
) -> Sample:
    first = next(rows[0] for rows in by_run if rows)
    answers = []
    if first.get("chosen") is not None:
        answers.append(_answer("the chosen answer", first, "chosen"))
    if first.get("start") is not None:
        answers.append(_answer("before training", first, "start"))
    for rows, name in zip(by_run, names, strict=True):
        if rows:
            who = f"{name}, " if len(by_run) > 1 else ""
            answers.append(_answer(f"{who}after step {rows[-1].get('step')}", rows[-1], "policy"))
    earlier = []
    if len(by_run) == 1:
        before = by_run[0][:-1]
        kept = {round(i * (len(before) - 1) / max(EARLIER - 1, 1)) for i in range(EARLIER)}
        earlier = [
            _answer(f"after step {row.get('step')}", row, "policy")
            for place, row in enumerate(before)
            if place in kept
        ]
    title = " · ".join(str(first[key]) for key in ("dataset", "row_id") if first.get(key))
    return Sample(title, _cut(prompt), answers, earlier)


def _answer(who: str, row: Mapping[str, Any], which: str) -> Answer:
    def held(key: str) -> Any:
        value = row.get(key)
        return value.get(which) if isinstance(value, Mapping) else None

    tokens = held("num_tokens")
    flags = held("flags")
    return Answer(
        who,
        _cut(str(row.get(which) or "")),
        "" if tokens is None else f"{tokens} tokens",
        tuple(map(str, flags)) if isinstance(flags, list) else (),
    )


def _cut(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} … ({left_out:,} characters more)"


# ---------------------------------------------------------------- evaluation jobs


def results(run: RunRecord) -> Table | None:
    """What evaluation jobs found of the model before training and after; None without any."""
    rows = []
    for row in run.results:
        base, trained = (_value(row.get(side)) for side in ("base", "trained"))
        difference = None if base is None or trained is None else trained - base
        better = row.get("higher_is_better")
        worse = better is not None and difference and (difference > 0) != bool(better)
        rows.append(
            [
                f"{row.get('job')}: {row.get('task')}",
                row.get("metric"),
                _with_error(row.get("base")),
                _with_error(row.get("trained")),
                None if difference is None else f"{difference:+.4g}{' (worse)' if worse else ''}",
            ]
        )
    heads = ["task", "metric", "before training", "after", "difference"]
    return Table(heads, rows) if rows else None


def _value(side: Any) -> float | None:
    value = side.get("value") if isinstance(side, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _with_error(side: Any) -> str | None:
    value = _value(side)
    if value is None:
        return None
    error = side.get("stderr")
    return f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) else "")


def win_rate(run: RunRecord) -> Table | None:
    """What a judge said of answers before training and after; None without one."""
    told = run.win_rate or {}
    rows = []
    for key, name in (
        ("win_rate", "win rate over the model before training"),
        ("win_rate_length_matched", "among answers of similar length"),
    ):
        rate = told.get(key)
        if isinstance(rate, Mapping):
            low, high = rate.get("low", math.nan), rate.get("high", math.nan)
            interval = f"95 %: {low:.1%} to {high:.1%}; {rate.get('num_pairs')} pairs"
            rows.append([name, f"{rate.get('rate', math.nan):.1%} ({interval})"])
    if "wins" in told:
        counts = ", ".join(f"{told.get(k)} {k}" for k in ("wins", "losses", "ties"))
        rows.append(["answers", counts])
    return Table(["a judge's verdict", ""], rows) if rows else None


# ---------------------------------------------------------------- settings and machine

# fmt: off
_ENVIRONMENT = (
    "command", "started", "ended", "seconds", "costs", "device", "threads", "world_size",
    "precision", "layout", "layout_why", "attention", "head_chunk_size", "compact_head",
    "save_dtype", "peak_memory_gib", "versions", "host", "resumed_from", "best_checkpoint",
    "model", "reference_namespace", "reference", "steps", "steps_per_epoch", "global_batch_size",
)
# fmt: on


def config(run: RunRecord) -> list[tuple[str, str]]:
    """Every option with its value."""
    return [(key, as_text(value)) for key, value in run.config.items()]


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Versions, machine, choices made at the start, and times."""
    held = {key: run.manifest[key] for key in _ENVIRONMENT if key in run.manifest}
    return [(key, as_text(value)) for key, value in _flat(held) if value not in (None, "", {})]


def differences(runs: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Options, versions and data that are not the same in all runs."""
    told = [_comparable(run) for run in runs]
    keys = dict.fromkeys(key for one in told for key in one)
    rows = [
        [key, *(one.get(key) for one in told)]
        for key in keys
        if len({one.get(key) for one in told}) > 1
    ]
    return Table(["", *names], rows)


def _comparable(run: RunRecord) -> dict[str, str]:
    keys = ("versions", "host", "device", "threads", "world_size", "precision", "layout", "model")
    held = {key: run.manifest[key] for key in (*keys, "attention") if key in run.manifest}
    found = dict(config(run)) | {key: as_text(value) for key, value in _flat(held)}
    for key, about in (run.manifest.get("data") or {}).items():
        if isinstance(about, Mapping):
            found[f"{key} rows"] = number(about.get("num_pairs"))
            found[f"{key} fingerprint"] = str(about.get("fingerprint"))
    for key in ("output_dir", "run_name"):  # the run itself, not how it was made
        found.pop(key, None)
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", part


def as_text(value: Any) -> str:
    """A value as YAML would nearly write it."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
