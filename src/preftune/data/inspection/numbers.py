"""Numbers of pairs, vectorised: lengths, length bias, shared prompts, duplicates, overlap."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import xxhash

from preftune.data.table import TokenRows, kept_positions, whole_lengths

QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)
"""In percent; 0 and 100 are the least and the greatest."""
_ODD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class Answers:
    """What the answers of a table's rows are like, one entry a row; 0 for dropped rows."""

    lengths: np.ndarray
    """(rows, 1 + answers) Tokens of prompts and answers before any cut."""
    keys: np.ndarray
    """(rows, answers) uint64 hashes of the answers' ids; equal answers share one."""
    first_scored: np.ndarray
    """(rows, answers) Index of the first token that the loss reads."""
    first_difference: np.ndarray
    """(rows,) Index of the first token in which the first two answers differ; where one begins the
    other, the length of the shorter. Of a lone answer 0, for it stays unlike any other."""

    def take(self, rows: np.ndarray) -> "Answers":
        """Those of some rows."""
        parts = self.lengths, self.keys, self.first_scored, self.first_difference
        return Answers(*(part[rows] for part in parts))


def read_answers(table: pa.Table) -> Answers:
    """Look at every answer of a table once, a shard at a time.

    Args:
        table: of `data.table.SCHEMA`, of rows with one answer, or with two.
    """
    lengths = whole_lengths(table)
    num_answers = lengths.shape[1] - 1
    keys = np.zeros((len(table), num_answers), np.uint64)
    first_scored = np.zeros((len(table), num_answers), np.int64)
    first_difference = np.zeros(len(table), np.int64)
    start = 0
    for batch in table.select(["reason", "completions", "scored"]).to_batches():
        rows = start + kept_positions(pa.Table.from_batches([batch]))
        start += len(batch)
        answers = batch.column("completions").flatten()
        ids = answers.values.to_numpy(zero_copy_only=False)
        edges = answers.offsets.to_numpy().tolist()
        keys[rows] = _keys(ids, edges).reshape(-1, num_answers)
        if num_answers == 2:
            first_difference[rows] = _first_differences(ids, edges)
        firsts = _first_scored(batch.column("scored").flatten())
        first_scored[rows] = firsts.reshape(-1, num_answers)
    return Answers(lengths, keys, first_scored, first_difference)


def _keys(ids: np.ndarray, edges: list[int]) -> np.ndarray:
    data = np.ascontiguousarray(ids).data
    digest = xxhash.xxh3_64_intdigest
    return np.array([digest(data[a:b]) for a, b in pairwise(edges)], dtype=np.uint64)


def _first_differences(ids: np.ndarray, edges: list[int]) -> list[int]:
    found = []
    for a, b, c in zip(edges[::2], edges[1::2], edges[2::2], strict=False):
        shorter = min(b - a, c - b)
        unlike = ids[a : a + shorter] != ids[b : b + shorter]
        index = int(unlike.argmax()) if shorter else 0
        found.append(index if shorter and unlike[index] else shorter)
    return found


def _first_scored(masks: pa.ListArray) -> np.ndarray:
    first = np.zeros(len(masks), np.int64)
    for index in np.flatnonzero(masks.is_valid().to_numpy(zero_copy_only=False)):
        first[index] = masks[int(index)].as_py().index(True)
    return first


def quantiles(values: np.ndarray) -> list[int]:
    """The values at `QUANTILES`: each the least that this part of all does not exceed.

    Args:
        values: (rows,) integers, at least one.
    """
    return np.percentile(values, QUANTILES, method="inverted_cdf").astype(int).tolist()


@dataclass(frozen=True)
class LengthBias:
    """How far the length of an answer alone gives away which one was chosen."""

    num_longer: int
    """Pairs whose chosen answer has more tokens."""
    num_equal: int
    num_shorter: int
    mean_difference: float
    """Tokens of the chosen answer less those of the rejected one, on average."""

    @property
    def longer_wins(self) -> float:
        """Accuracy of taking the longer answer for the chosen one, and either where equal."""
        pairs = self.num_longer + self.num_equal + self.num_shorter
        return (self.num_longer + self.num_equal / 2) / pairs


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> LengthBias:
    """Compare the lengths of the two sides.

    Args:
        chosen: (rows,) tokens.
        rejected: (rows,) tokens.
    """
    difference = chosen - rejected
    return LengthBias(
        num_longer=int((difference > 0).sum()),
        num_equal=int((difference == 0).sum()),
        num_shorter=int((difference < 0).sum()),
        mean_difference=float(difference.mean()),
    )


@dataclass(frozen=True)
class SharedPrompts:
    """How many rows ask the same."""

    num_prompts: int
    most_rows: int
    """Rows on the commonest prompt."""
    num_sharing: int
    """Rows whose prompt another row has too."""
    tokens_per_answer: int
    """Prompt tokens where every answer carries its prompt."""
    tokens_per_row: int
    """Prompt tokens where the answers of a row share theirs."""
    tokens_per_prompt: int
    """Prompt tokens where every prompt stands once."""


def shared_prompts(keys: np.ndarray, lengths: np.ndarray, num_answers: int) -> SharedPrompts:
    """Count prompts and what sharing them saves.

    Args:
        keys: (rows,) of prompts.
        lengths: (rows,) tokens of prompts.
        num_answers: of each row.
    """
    _, index, counts = np.unique(keys, return_inverse=True, return_counts=True)
    longest = np.zeros(len(counts), np.int64)
    np.maximum.at(longest, index, lengths)  # a cut may leave more of a prompt in one row
    total = int(lengths.sum())
    return SharedPrompts(
        num_prompts=len(counts),
        most_rows=int(counts.max()),
        num_sharing=int(counts[counts > 1].sum()),
        tokens_per_answer=num_answers * total,
        tokens_per_row=total,
        tokens_per_prompt=int(longest.sum()),
    )


@dataclass(frozen=True)
class Duplicates:
    """Rows that say nothing new, or the opposite."""

    repeats: np.ndarray
    """Rows equal to an earlier one in all tokens."""
    originals: np.ndarray
    """(repeats,) The earlier row that each repeats."""
    num_swapped_prompts: int
    """Prompts with two answers that are paired in both orders, each once the better one; of rows
    with one answer, prompts with an answer under both labels."""
    num_swapped: int
    """Rows with such answers."""
    num_answers: int
    """Distinct answers to a prompt; without any sharing there are as many as rows have."""


def duplicates(
    content: np.ndarray, prompts: np.ndarray, answers: np.ndarray, is_chosen: np.ndarray
) -> Duplicates:
    """Find equal rows and those that contradict each other.

    Args:
        content: (rows,) keys of whole rows.
        prompts: (rows,) keys of prompts.
        answers: (rows, 1 or 2) keys of answers.
        is_chosen: (rows,) whether the first answer is chosen: always so in pairs.
    """
    _, first, index = np.unique(content, return_index=True, return_inverse=True)
    originals = first[index]
    repeats = np.flatnonzero(originals != np.arange(len(content)))
    given = [_mixed(prompts, answer) for answer in answers.T]
    if len(given) == 2:
        forward, backward = _mixed(given[0], answers[:, 1]), _mixed(given[1], answers[:, 0])
        swapped = np.isin(forward, backward) & (answers[:, 0] != answers[:, 1])
    else:
        both = np.intersect1d(given[0][is_chosen], given[0][~is_chosen])
        swapped = np.isin(given[0], both)
    return Duplicates(
        repeats=repeats,
        originals=originals[repeats],
        num_swapped_prompts=len(np.unique(prompts[swapped])),
        num_swapped=int(swapped.sum()),
        num_answers=len(np.unique(np.concatenate(given))),
    )


def _mixed(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One hash of two, in which their order counts."""
    return left * _ODD[0] + (right ^ (right >> np.uint64(29))) * _ODD[1]


@dataclass(frozen=True)
class Overlap:
    """What training and a held-out set have in common."""

    num_prompts: int
    """Prompts in both; 0 where the split is right."""
    num_answers: int
    """Held-out answers, of all prompts, that are an answer to some prompt in training too."""


def overlap(
    train: TokenRows, train_answers: Answers, held_out: TokenRows, held_out_answers: Answers
) -> Overlap:
    """Compare prompts and answers, before any cut."""
    common = np.intersect1d(train.prompt_keys, held_out.prompt_keys)
    known = np.isin(held_out_answers.keys, train_answers.keys)
    return Overlap(len(common), int(known.sum()))
