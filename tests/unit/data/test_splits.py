"""Splits by prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.pairs import PairDataset, RowCounts, load_pairs
from preftune.data.splits import split_by_prompt, without_prompts_of
from preftune.errors import DataError
from preftune.schema import Completion, TokenizedExample
from tests.tiny import chat_row, make_pairs, tiny_tokenizer, write_jsonl


def dataset(prompts: list[int], copies: list[int] | None = None) -> PairDataset:
    """One row a prompt key given, and two further rows that were dropped at loading."""
    examples = tuple(
        TokenizedExample(
            row_id=f"f:{i}",
            prompt_ids=(key,),
            completions=(Completion((i,)), Completion((i + 1,))),
            roles=("chosen", "rejected"),
            source="s",
            prompt_key=key,
        )
        for i, key in enumerate(prompts)
    )
    counts = RowCounts(
        read=len(prompts) + 2,
        kept=len(prompts),
        dropped={"equal_completions": 2},
        truncated=0,
        dropped_rows=(("g:1", "equal_completions"), ("g:2", "equal_completions")),
    )
    made = PairDataset.of("set", examples)
    return replace(made, counts=counts, copies=None if copies is None else np.array(copies))


@given(
    prompts=st.lists(st.integers(0, 12), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1),
    size=st.floats(0.01, 0.99) | st.integers(1, 39),
    seed=st.integers(0, 5),
)
def test_no_prompt_on_both_sides_no_row_lost_and_order_kept(
    prompts: list[int], size: float | int, seed: int
) -> None:
    whole = dataset(prompts)
    try:
        train, test = split_by_prompt(whole, size, seed)
    except DataError:
        assert isinstance(size, int)
        return
    assert train.examples
    assert test.examples
    assert not {e.prompt_key for e in train.examples} & {e.prompt_key for e in test.examples}
    assert sorted(e.row_id for e in [*train.examples, *test.examples]) == sorted(
        e.row_id for e in whole.examples
    )
    for side in (train, test):
        numbers = [int(e.row_id[2:]) for e in side.examples]
        assert numbers == sorted(numbers)
        assert side.counts.kept == len(side.examples)
        assert side.counts.read == side.counts.kept + sum(side.counts.dropped.values())
        assert side.name == "set"
    assert train.counts.read + test.counts.read == whole.counts.read
    if isinstance(size, int):
        assert len(test.examples) >= size
    again = split_by_prompt(whole, size, seed)
    assert [s.examples.fingerprint() for s in again] == [
        s.examples.fingerprint() for s in (train, test)
    ]


def test_the_side_of_a_prompt_does_not_depend_on_the_order_of_rows() -> None:
    prompts = [1, 1, 2, 3, 4, 4, 4, 5]

    def held_out(order: list[int]) -> set[int]:
        return {e.prompt_key for e in split_by_prompt(dataset(order), 3, 7)[1].examples}

    assert held_out(prompts) == held_out(prompts[::-1])


def test_seeds_differ() -> None:
    whole = dataset(list(range(50)))
    sides = {
        tuple(e.prompt_key for e in split_by_prompt(whole, 10, seed)[1].examples)
        for seed in range(5)
    }
    assert len(sides) == 5
    assert all(len(side) == 10 for side in sides)


@pytest.mark.parametrize(("size", "rows"), [(0.2, 4), (0.5, 10), (7, 7), (0.001, 1), (0.999, 19)])
def test_sizes(size: float | int, rows: int) -> None:
    train, test = split_by_prompt(dataset(list(range(20))), size, 0)
    assert (len(train.examples), len(test.examples)) == (20 - rows, rows)


def test_counts_of_both_sides() -> None:
    whole = dataset(list(range(10)))
    train, test = split_by_prompt(whole, 3, 0)
    assert test.counts == RowCounts(3, 3, {}, 0, ())
    assert train.counts == RowCounts(9, 7, whole.counts.dropped, 0, whole.counts.dropped_rows)


def test_repeated_rows_stand_once_on_the_test_side() -> None:
    train, test = split_by_prompt(dataset([1, 2, 3, 4], [1, 3, 0 + 2, 2]), 2, 0)
    assert len(test.repeated().examples) == 2
    kept = {1: 1, 2: 3, 3: 2, 4: 2}
    wanted = [e.row_id for e in train.examples for _ in range(kept[e.prompt_key])]
    assert [e.row_id for e in train.repeated().examples] == wanted


def test_rows_whose_prompt_is_evaluated_are_not_trained_on() -> None:
    train, first, second = dataset([1, 2, 3, 4, 2]), dataset([2, 9]), dataset([4])
    left = without_prompts_of(train, [first, second])
    assert [e.prompt_key for e in left.examples] == [1, 3]
    assert left.counts.dropped == {"equal_completions": 2, "prompt_held_out": 3}
    assert left.counts.read == left.counts.kept + sum(left.counts.dropped.values())
    assert without_prompts_of(train, [dataset([7])]) is train
    with pytest.raises(DataError, match="all of its 5 prompts are in eval_dataset"):
        without_prompts_of(train, [train])


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (0, "test_size is 0 rows"),
        (-1, "test_size is -1 rows"),
        (10, "test_size is 10 rows, and there are 10; choose from 1 to 9"),
        (0.0, "strictly between 0 and 1"),
        (1.0, "strictly between 0 and 1"),
        (float("nan"), "strictly between 0 and 1"),
        (True, "test_size is True"),
        ("a", "test_size is 'a'"),
    ],
)
def test_sizes_out_of_range(size: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        split_by_prompt(dataset(list(range(10))), size, 0)


def test_too_few_prompts() -> None:
    with pytest.raises(DataError, match="6 rows on 1 prompt cannot be split by prompt"):
        split_by_prompt(dataset([3] * 6), 0.5, 0)


def test_a_number_that_whole_prompts_cannot_reach() -> None:
    with pytest.raises(DataError, match=r"the most this split can take is \d"):
        split_by_prompt(dataset([1] * 5 + [2] * 5), 9, 0)
    train, test = split_by_prompt(dataset([1] * 5 + [2] * 5), 0.9, 0)
    assert (len(train.examples), len(test.examples)) == (5, 5)


def test_loaded_rows_of_one_prompt_stay_together_even_where_truncation_makes_more_equal(
    tmp_path: Path,
) -> None:
    rows = [*make_pairs(30, prompts=6), chat_row("0 other", "a", "b")]
    data = load_pairs(
        str(write_jsonl(tmp_path / "d.jsonl", rows)),
        column_map=None,
        tokenizer=tiny_tokenizer(),
        max_length=60,
        max_prompt_length=5,
        truncation="keep_end",
        max_dropped_fraction=0.0,
    )
    assert len({e.prompt_key for e in data.examples}) == 7
    train, test = split_by_prompt(data, 0.3, 0)
    assert train.counts.truncated + test.counts.truncated == data.counts.truncated == 31
    assert not {e.prompt_key for e in train.examples} & {e.prompt_key for e in test.examples}
