"""Answers of other prompts beside a row's own."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.batching.layout import Layout, build_layout
from preftune.data.table import TokenizedRow, TokenRows, apply_limits, make_table
from preftune.data.truncate import Limits
from preftune.errors import DataError
from preftune.schema import Completion, TokenizedExample


def row(
    index: int, prompt: int, answer: int, key: int, mask: tuple[bool, ...] | None = None
) -> TokenizedExample:
    """A row whose answer's tokens all are 1,000 + its index."""
    completion = Completion((1000 + index,) * answer, mask)
    prompt_ids = (key,) * prompt
    return TokenizedExample(f"f:{index}", prompt_ids, (completion,), ("chosen",), "s", key)


def rows_of(examples: list[TokenizedExample], limits: Limits | None = None) -> TokenRows:
    limits = limits or Limits(None, None, "drop")
    table = make_table([TokenizedRow(example) for example in examples], "s")
    return TokenRows([table], ["s"], [apply_limits(table, "s", limits)[0]], limits)


def partners(rows: TokenRows) -> list[int]:
    """Index of the row that each mismatched answer is of."""
    return [example.completions[1].ids[0] - 1000 for example in rows]


ROWS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 4), st.booleans()),
    min_size=2,
    max_size=12,
)


@settings(deadline=None)
@given(
    parts=ROWS,
    seed=st.integers(0, 5),
    max_length=st.none() | st.integers(2, 12),
    truncation=st.sampled_from(["keep_start", "keep_end"]),
)
def test_whatever_the_rows(parts, seed: int, max_length: int | None, truncation) -> None:
    limits = Limits(max_length, None, truncation)
    examples = [
        # Of a masked answer, only its last token is scored, which a cut may take away.
        row(i, prompt, answer, key, (False,) * (answer - 1) + (True,) if masked else None)
        for i, (prompt, answer, key, masked) in enumerate(parts)
    ]
    own = rows_of(examples, limits)
    if len(own) < 2:
        return
    rows = own.with_mismatched(seed)
    keys = {int(key) for key in own.prompt_keys}
    answers = {example.row_id: example.completions[0] for example in examples}
    for before, example, length, scored in zip(
        own, rows, rows.lengths.tolist(), rows.num_scored.tolist(), strict=True
    ):
        first, second = example.completions
        partner = second.ids[0] - 1000
        assert (first, example.roles) == (before.completions[0], ("chosen", "mismatched"))
        assert example.row_id != f"f:{partner}"
        assert (examples[partner].prompt_key != example.prompt_key) or len(keys) == 1
        assert max(example.lengths) <= (max_length or 100)
        room = (max_length or 100) - len(example.prompt_ids)
        assert second.ids == answers[f"f:{partner}"].ids[:room]
        assert first.num_scored >= 1
        assert second.num_scored >= 1
        assert length == [len(example.prompt_ids), len(first.ids), len(second.ids)]
        assert scored == [first.num_scored, second.num_scored]
    assert list(rows) == list(own.with_mismatched(seed))
    assert rows.num_tokens == sum(sum(example.lengths) for example in rows)
    assert rows.longest_side.tolist() == [max(example.lengths) for example in rows]
    assert rows.sizes.lengths.tolist() == rows.lengths.tolist()
    assert rows.is_cut.tolist() == own.is_cut.tolist()
    assert rows.num_answers == 2


def test_each_answer_is_used_once_where_prompts_differ() -> None:
    rows = rows_of([row(i, 2, 3, key=i) for i in range(50)]).with_mismatched(0)
    assert sorted(partners(rows)) == list(range(50))


def test_one_prompt_among_many_rows_of_another_is_everybodys_partner() -> None:
    examples = [row(i, 2, 3, key=int(i == 7)) for i in range(20)]
    found = partners(rows_of(examples).with_mismatched(3))
    assert found[7] != 7
    assert found[:7] + found[8:] == [7] * 19


def test_one_prompt_alone_takes_any_other_row() -> None:
    found = partners(rows_of([row(i, 2, 3, key=1) for i in range(9)]).with_mismatched(0))
    assert all(partner != i for i, partner in enumerate(found))
    assert sorted(found) == list(range(9))


def test_repeats_of_a_row_are_that_row() -> None:
    own = rows_of([row(i, 2, 3, key=1) for i in range(3)]).take(np.array([0, 0, 0, 1, 1, 2]))
    found = partners(own.with_mismatched(1))
    assert all(a != b for a, b in zip(found, (0, 0, 0, 1, 1, 2), strict=True))


@pytest.mark.parametrize("copies", [1, 3])
def test_a_row_without_another_is_refused(copies: int) -> None:
    own = rows_of([row(0, 2, 3, key=1)]).take(np.zeros(copies, dtype=np.int64))
    with pytest.raises(DataError, match=r"^s: f:0 is the only row, .*; give two rows or more$"):
        own.with_mismatched(0)


def test_pairs_have_none() -> None:
    pair = replace(row(0, 2, 3, 1), completions=(Completion((1,)), Completion((2,))))
    with pytest.raises(AssertionError):
        rows_of([replace(pair, roles=("chosen", "rejected"))] * 2).with_mismatched(0)


def test_taken_rows_keep_their_partners() -> None:
    rows = rows_of([row(i, 2, i + 1, key=i) for i in range(8)]).with_mismatched(0)
    assert rows.lengths.shape == (8, 3)  # what is kept of it must not be that of the rows taken
    assert rows.num_scored.shape == (8, 2)
    some = np.array([5, 2, 2])
    taken = rows.take(some)
    assert list(taken) == [rows[int(i)] for i in some]
    assert taken.lengths.tolist() == rows.lengths[some].tolist()
    assert taken.num_scored.tolist() == rows.num_scored[some].tolist()
    assert list(rows[1:3]) == [rows[1], rows[2]]


def test_seed_and_partners_are_in_the_fingerprint() -> None:
    examples = [row(i, 2, 3, key=i) for i in range(20)]
    own = rows_of(examples)
    prints = {own.fingerprint(), *(own.with_mismatched(seed).fingerprint() for seed in range(3))}
    assert len(prints) == 4
    assert own.with_mismatched(1).fingerprint() == own.with_mismatched(1).fingerprint()
    # A limit that cuts no own answer cuts mismatched ones, and with them what is trained on.
    longer = [replace(examples[0], prompt_ids=(0,) * 5), *examples[1:]]
    cut = rows_of(longer, Limits(8, None, "drop")).with_mismatched(1)
    tight = [*longer[1:], row(20, 1, 6, key=20)]
    assert not rows_of(tight, Limits(7, None, "drop")).is_cut.any()
    whole = rows_of(tight).with_mismatched(1)
    cut = rows_of(tight, Limits(7, None, "drop")).with_mismatched(1)
    assert partners(whole) == partners(cut)
    assert whole.fingerprint() != cut.fingerprint()


def test_the_highest_id_counts_mismatched_answers() -> None:
    rows = rows_of([row(i, 2, 3, key=i) for i in range(4)]).with_mismatched(0)
    at = partners(rows).index(3)
    assert rows.take(np.array([at])).highest_id == 1003


def test_prompts_are_shared_with_the_mismatched_answer() -> None:
    rows = rows_of([row(i, 4, 3, key=i) for i in range(3)]).with_mismatched(0)
    layout = build_layout(list(rows), Layout("shared_prefix"))
    assert layout.num_completions == 6
