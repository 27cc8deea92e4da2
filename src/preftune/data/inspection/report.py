"""All that is found out about a run's data, as tables that text and page share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preftune.data.inspection.numbers import (
    QUANTILES,
    Answers,
    Duplicates,
    LengthBias,
    Overlap,
    SharedPrompts,
    duplicates,
    length_bias,
    quantiles,
    shared_prompts,
)
from preftune.data.inspection.proving import MEANING as PROVES
from preftune.data.inspection.proving import ProofCounts
from preftune.data.inspection.shown import ShownRow
from preftune.data.inspection.truncation import TruncationCost, truncation_cost
from preftune.data.pairs import PairDataset
from preftune.data.reasons import MEANING as MEANS
from preftune.data.reasons import DropReason
from preftune.data.truncate import Limits

LENGTHS_TRIED = (256, 512, 1024, 2048, 4096)
_NUM_IDS = 3


@dataclass(frozen=True)
class Table:
    """One table, with a line on what it means."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class DroppedRow:
    """One row that is not trained on."""

    source: str
    row_id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class DatasetReport:
    """What is found out about training pairs, or one held-out set."""

    title: str
    """Training, or which held-out set."""
    name: str
    num_rows: int
    unit: str
    """What its rows are: pairs, or rows."""
    shown: tuple[ShownRow, ...]
    tables: tuple[Table, ...]
    dropped: tuple[DroppedRow, ...]


@dataclass(frozen=True)
class Report:
    """What is found out about a run's data."""

    facts: tuple[tuple[str, str], ...]
    """Name and value of what decided the tokens."""
    datasets: tuple[DatasetReport, ...]
    overlap: Table | None
    warnings: tuple[str, ...]
    """What would stop training or is likely a mistake."""
    is_whole: bool
    """Whether rows are to be shown in full in a terminal, too."""


def count_table(dataset: PairDataset) -> Table:
    """Rows read, kept and left out, a line a source."""
    parts = [(source.name, source.counts, source.num_drawn) for source in dataset.sources]
    if len(parts) != 1:
        whole = "all" if parts else f"{dataset.name} (split off)"
        parts.append((whole, dataset.counts, sum(drawn for *_, drawn in parts)))
    rows = []
    for name, counts, drawn in parts:
        dropped = sum(counts.dropped.values())
        again = max(0, drawn - counts.kept)
        numbers = (counts.read, counts.kept, dropped, counts.not_drawn, counts.truncated, again)
        rows.append((name, *map(number, numbers)))
    columns = ("source", "read", "kept", "dropped", "not drawn", "cut", "repeats")
    return Table("Rows", columns, tuple(rows), _count_note(dataset))


def _count_note(dataset: PairDataset) -> str:
    notes = []
    kept = sum(source.counts.kept for source in dataset.sources)
    if dataset.sources and len(dataset.examples) != kept:
        notes.append(
            f"Of these, {number(len(dataset.examples))} are here; the others are on the other side "
            "of the split, or left out because a held-out set has their prompts."
        )
    if dataset.copies is not None:
        notes.append(
            f"With what the mix repeats, an epoch has {number(int(dataset.copies.sum()))} "
            f"{dataset.unit}; below, each counts once."
        )
    return " ".join(notes)


def dropped_table(dropped: Sequence[DroppedRow]) -> Table | None:
    """Dropped rows by reason; None where there are none."""
    reasons = [row.reason for row in dropped]
    counts = sorted({(-reasons.count(reason), reason) for reason in set(reasons)})
    rows = tuple((reason, number(-n), MEANS[DropReason(reason)]) for n, reason in counts)
    return Table("Dropped rows", ("reason", "rows", "meaning"), rows) if rows else None


def proof_table(counts: ProofCounts) -> Table:
    """For how many rows each proof holds."""
    rows = []
    for name, held in counts.held.items():
        failing = counts.num_rows - held
        ids = ", ".join(counts.failing[name]) + (
            ", …" if failing > len(counts.failing[name]) else ""
        )
        rows.append((name, number(held), number(failing), ids, PROVES[name]))
    sample = "" if counts.num_rows == counts.of_rows else ", drawn by the seed"
    return Table(
        "Proofs",
        ("proof", "hold", "fail", "first that fail", "meaning"),
        tuple(rows),
        f"Read again from the source, before any cut: {number(counts.num_rows)} of "
        f"{number(counts.of_rows)} rows{sample}.",
    )


def length_table(dataset: PairDataset) -> Table:
    """Quantiles of lengths as they are trained."""
    lengths = dataset.examples.lengths
    parts = {"prompt": lengths[:, 0]}
    if dataset.examples.num_answers == 1:
        for role in ("chosen", "rejected", "answer"):
            parts[role] = lengths[dataset.examples.roles == role, 1]
        if len(parts["answer"]):
            parts["trained"] = dataset.examples.num_scored[:, 0]
        parts = {name: values for name, values in parts.items() if len(values)}
        note = "Tokens, after any cut. Longest side: the prompt and its answer."
        if "answer" in parts:
            note += " Trained: those of the answer that the assistant wrote."
    else:
        parts |= {"chosen": lengths[:, 1], "rejected": lengths[:, 2]}
        note = "Tokens, after any cut. Longest side: the prompt and the longer answer."
    parts["longest side"] = dataset.examples.longest_side
    rows = [
        (name, *map(number, quantiles(values)), f"{values.mean():,.1f}")
        for name, values in parts.items()
    ]
    names = ("min", *(f"{percent}%" for percent in QUANTILES[1:-1]), "max", "mean")
    return Table("Lengths", ("", *names), tuple(rows), note)


def bias_table(bias: LengthBias) -> Table:
    """What length alone says of the choice."""
    pairs = bias.num_longer + bias.num_equal + bias.num_shorter
    rows = (
        ("chosen is longer", number(bias.num_longer), share(bias.num_longer, pairs)),
        ("equally long", number(bias.num_equal), share(bias.num_equal, pairs)),
        ("chosen is shorter", number(bias.num_shorter), share(bias.num_shorter, pairs)),
    )
    right = bias.longer_wins
    rule = f"“the longer one” is right in {right:.1%} of the pairs"
    if right < 0.5:
        rule += f", “the shorter one” in {1 - right:.1%}"
    more = "more" if bias.mean_difference >= 0 else "fewer"
    note = (
        f"On average the chosen answer has {abs(bias.mean_difference):,.1f} tokens {more} than the "
        f"rejected one, after any cut. Without reading any text, {rule} (50%: length says nothing)."
    )
    return Table("Length bias", ("", "pairs", "share"), rows, note)


def label_table(lengths: np.ndarray, is_chosen: np.ndarray) -> Table:
    """How rows of one answer are labelled, and how long the answers are.

    Args:
        lengths: (rows,) tokens of the answers.
        is_chosen: (rows,) their labels.
    """
    rows = []
    for name, mask in (("chosen (label true)", is_chosen), ("rejected (label false)", ~is_chosen)):
        mean = f"{lengths[mask].mean():,.1f}" if mask.any() else ""
        rows.append((name, number(int(mask.sum())), share(int(mask.sum()), len(mask)), mean))
    note = "Answers' tokens are counted after any cut."
    return Table("Labels", ("", "rows", "share", "mean tokens"), tuple(rows), note)


def prompt_table(shared: SharedPrompts, num_rows: int, unit: str) -> Table:
    """How many rows ask the same, and what sharing saves."""
    every = shared.tokens_per_answer

    def tokens(number_of: int) -> str:
        return f"{number(number_of)} ({share(number_of, every)})"

    rows = (
        ("distinct prompts", number(shared.num_prompts)),
        (
            f"{unit} a prompt",
            f"{num_rows / shared.num_prompts:.2f} on average, {number(shared.most_rows)} at most",
        ),
        (
            f"{unit} on a shared prompt",
            f"{number(shared.num_sharing)} ({share(shared.num_sharing, num_rows)})",
        ),
        ("prompt tokens, once an answer", tokens(every)),
        (f"… once a {unit.removesuffix('s')}", tokens(shared.tokens_per_row)),
        ("… once a prompt", tokens(shared.tokens_per_prompt)),
    )
    return Table("Prompts", ("", ""), rows)


def duplicate_table(found: Duplicates, ids: Sequence[tuple[str, str]], opposite: str) -> Table:
    """Rows that say nothing new, or the opposite.

    Args:
        found: the numbers.
        ids: of the first repeats, each with that of the row it repeats.
        opposite: what a row is called that says the opposite of another; empty where none can.
    """
    first = ", ".join(f"{repeat} = {original}" for repeat, original in ids)
    more = ", …" if len(found.repeats) > len(ids) else ""
    swapped = number(found.num_swapped), f"on {number(found.num_swapped_prompts)} prompts"
    rows = [
        ("rows equal to an earlier one", number(len(found.repeats)), first + more),
        *([(opposite, *swapped)] if opposite else []),
        ("distinct answers to a prompt", number(found.num_answers), ""),
    ]
    return Table(
        "Duplicates", ("", "number", ""), tuple(rows), "Compared by tokens, before any cut."
    )


def cost_table(costs: Sequence[TruncationCost], configured: Limits) -> Table:
    """What several lengths would cost.

    Args:
        costs: one for each length and truncation.
        configured: the limits of the run.
    """
    rows = []
    for cost in costs:
        limits = cost.limits
        is_configured = (limits.max_length, limits.truncation) == (
            configured.max_length,
            configured.truncation,
        )
        lost = (
            share(cost.num_dropped, cost.num_rows),
            share(cost.answer_tokens_lost, cost.answer_tokens),
            share(cost.prompt_tokens_lost, cost.prompt_tokens),
        )
        if not cost.num_over and limits.truncation != "drop" and not is_configured:
            continue  # nothing is over: one line says it
        mode = limits.truncation if cost.num_over or is_configured else "any"
        about = (number(limits.max_length or 0), number(cost.num_over), mode)
        rows.append((*about, *lost, "configured" if is_configured else ""))
    note = (
        f"Parts of {number(costs[0].num_rows)} tokenised rows and their tokens, before any limit, "
        "mix or split."
    )
    if configured.max_prompt_length is not None:
        note += f" max_prompt_length is {configured.max_prompt_length} throughout."
    columns = ("max_length", "rows over", "truncation", "rows lost", "answer tokens lost")
    return Table(
        "What truncation would cost", (*columns, "prompt tokens lost", ""), tuple(rows), note
    )


def truncation_costs(answers: Answers, configured: Limits) -> list[TruncationCost]:
    """The cost of several lengths under each truncation.

    Args:
        answers: of all tokenised rows.
        configured: the limits of the run.
    """
    prompt = configured.max_prompt_length
    return [
        truncation_cost(answers, Limits(length, prompt, mode))
        for length in sorted({*LENGTHS_TRIED, configured.max_length or LENGTHS_TRIED[0]})
        for mode in ("drop", "keep_start", "keep_end")
    ]


def number_tables(dataset: PairDataset, answers: Answers) -> list[Table]:
    """The tables on lengths, prompts and duplicates.

    Args:
        dataset: the pairs.
        answers: of every row of its table.
    """
    examples = dataset.examples
    lengths = examples.lengths
    here = answers.take(examples.positions)
    is_chosen = examples.roles == "chosen"
    found = duplicates(examples.content_keys, examples.prompt_keys, here.keys, is_chosen)
    ids = [
        (examples.row_id(int(repeat)), examples.row_id(int(original)))
        for repeat, original in zip(
            found.repeats[:_NUM_IDS], found.originals[:_NUM_IDS], strict=True
        )
    ]
    if examples.num_answers > 1:
        about = [bias_table(length_bias(lengths[:, 1], lengths[:, 2]))]
        opposite = "rows whose two answers are also paired the other way round"
    elif (examples.roles == "answer").any():
        about, opposite = [], ""
    else:
        about = [label_table(lengths[:, 1], is_chosen)]
        opposite = "rows whose answer also has the other label"
    prompts = shared_prompts(examples.prompt_keys, lengths[:, 0], examples.num_answers)
    return [
        length_table(dataset),
        *about,
        prompt_table(prompts, len(examples), dataset.unit),
        duplicate_table(found, ids, opposite),
    ]


def overlap_table(overlaps: Sequence[tuple[str, int, Overlap, int]]) -> Table:
    """What training has in common with each held-out set.

    Args:
        overlaps: title of the set, its answers, what is common, and the training rows that were
            left out because the set has their prompts.
    """
    rows = tuple(
        (
            title,
            number(found.num_prompts),
            number(left_out),
            f"{number(found.num_answers)} ({share(found.num_answers, answers)})",
        )
        for title, answers, found, left_out in overlaps
    )
    return Table(
        "Overlap with training",
        ("", "prompts in both", "rows left out of training for it", "answers known from training"),
        rows,
        "Prompts in both must be 0. Known answers: held-out answers, of any prompt, that are an "
        "answer in training too; short ones often are.",
    )


def tokenised(answers: Answers) -> Answers:
    """Those of the rows that were not dropped while they were tokenised."""
    return answers.take(np.flatnonzero(answers.lengths[:, 0]))


def number(count: int) -> str:
    """A count with thousands apart."""
    return f"{count:,}"


def share(part: int, whole: int) -> str:
    """A part in percent; what is not all or nothing is not rounded to it."""
    percent = 100 * part / max(whole, 1)
    if 0 < percent < 0.05:
        return "<0.1%"
    return ">99.9%" if percent >= 99.95 and part < whole else f"{percent:.1f}%"
