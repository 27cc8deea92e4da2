"""Cutting rows, with lengths a reader can count."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.reasons import Dropped, DropReason
from preftune.data.truncate import Limits, truncate
from preftune.errors import ConfigError
from preftune.schema import Completion, TokenizedExample

STOP = 0


def row(prompt: int, chosen: int, rejected: int) -> TokenizedExample:
    """Prompt 100, 101, …; chosen 200, …, STOP; rejected 300, …, STOP; lengths as given."""
    return TokenizedExample(
        row_id="f:1",
        prompt_ids=tuple(range(100, 100 + prompt)),
        completions=tuple(
            Completion((*range(start, start + n - 1), STOP))
            for start, n in ((200, chosen), (300, rejected))
        ),
        roles=("chosen", "rejected"),
        source="s",
        prompt_key=7,
    )


def cut(example: TokenizedExample, max_length: int | None, prompt: int | None, mode: Any) -> Any:
    result = truncate(example, Limits(max_length, prompt, mode))
    if isinstance(result, Dropped):
        return result.reason.value
    return result.prompt_ids, *(c.ids for c in result.completions)


@pytest.mark.parametrize("mode", ["drop", "keep_start", "keep_end"])
def test_rows_within_the_limits_are_the_same_object(mode: Any) -> None:
    example = row(4, 3, 5)
    assert truncate(example, Limits(9, 4, mode)) is example
    assert truncate(example, Limits(None, None, mode)) is example


def test_drop() -> None:
    assert cut(row(4, 3, 5), 8, None, "drop") == "over_length"
    assert cut(row(4, 3, 5), 9, 3, "drop") == "prompt_over_length"
    assert cut(row(4, 3, 5), 8, 3, "drop") == "prompt_over_length"


def test_keep_start_cuts_answers_at_the_end_and_adds_no_stop() -> None:
    assert cut(row(4, 3, 5), 8, None, "keep_start") == (
        (100, 101, 102, 103),
        (200, 201, STOP),
        (300, 301, 302, 303),
    )


def test_keep_start_keeps_the_prompts_first_tokens() -> None:
    assert cut(row(6, 3, 3), 5, 3, "keep_start") == ((100, 101, 102), (200, 201), (300, 301))
    # A prompt longer than max_length leaves one token for the answer.
    assert cut(row(6, 3, 3), 5, None, "keep_start") == ((100, 101, 102, 103), (200,), (300,))
    assert cut(row(6, 2, 2), None, 2, "keep_start") == ((100, 101), (200, STOP), (300, STOP))


def test_keep_end_keeps_the_prompts_last_tokens_so_that_the_longer_answer_fits() -> None:
    assert cut(row(6, 3, 5), 8, None, "keep_end") == (
        (103, 104, 105),
        (200, 201, STOP),
        (300, 301, 302, 303, STOP),
    )
    assert cut(row(6, 3, 5), 8, 2, "keep_end")[0] == (104, 105)
    assert cut(row(6, 3, 5), None, 2, "keep_end")[0] == (104, 105)


def test_keep_end_cuts_answers_once_one_prompt_token_is_left() -> None:
    assert cut(row(6, 3, 5), 4, None, "keep_end") == ((105,), (200, 201, STOP), (300, 301, 302))


def test_answers_that_are_equal_once_cut_are_dropped() -> None:
    example = row(2, 3, 3)
    same = (Completion((9, 1, STOP)), Completion((9, 2, STOP)))
    example = TokenizedExample("f:1", example.prompt_ids, same, example.roles, "s", 7)
    assert cut(example, 3, None, "keep_start") == "equal_completions"


def test_masks_are_cut_alike_and_rows_without_a_scored_token_dropped() -> None:
    late = Completion((1, 2, 3, 4), (True, False, False, True))
    example = TokenizedExample("f:1", (9,), (late, Completion((5,))), ("chosen", "rejected"), "", 7)
    result = truncate(example, Limits(3, None, "keep_start"))
    assert isinstance(result, TokenizedExample)
    assert result.completions[0] == Completion((1, 2), (True, False))
    only_last = Completion((1, 2, 3, 4), (False, False, False, True))
    example = TokenizedExample("f:1", (9,), (only_last, late), ("chosen", "rejected"), "", 7)
    assert truncate(example, Limits(3, None, "keep_start")) == Dropped(
        "f:1", DropReason.OVER_LENGTH
    )


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ((1, None, "drop"), "max_length is 1"),
        ((None, 0, "drop"), "max_prompt_length is 0"),
        ((8, 4, "left"), "truncation is 'left'"),
    ],
)
def test_limits_without_room(limits: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Limits(*limits)


@given(
    prompt=st.integers(1, 20),
    chosen=st.integers(1, 20),
    rejected=st.integers(2, 20),
    max_length=st.none() | st.integers(2, 30),
    max_prompt=st.none() | st.integers(1, 20),
    mode=st.sampled_from(["drop", "keep_start", "keep_end"]),
)
def test_every_cut_row_respects_the_limits_and_is_a_part_of_the_whole(
    prompt: int,
    chosen: int,
    rejected: int,
    max_length: int | None,
    max_prompt: int | None,
    mode: Any,
) -> None:
    whole = row(prompt, chosen, rejected)
    result = truncate(whole, Limits(max_length, max_prompt, mode))
    if isinstance(result, Dropped):
        assert mode == "drop"
        return
    assert max(result.lengths) <= (max_length or 99)
    assert 1 <= len(result.prompt_ids) <= (max_prompt or 99)
    kept = len(result.prompt_ids)
    if mode == "keep_end":
        assert result.prompt_ids == whole.prompt_ids[-kept:]
    else:
        assert result.prompt_ids == whole.prompt_ids[:kept]
    for after, before in zip(result.completions, whole.completions, strict=True):
        assert after.num_scored >= 1
        assert after.ids == before.ids[: len(after.ids)]
        assert (after.ids[-1] == STOP) == (after.ids == before.ids)
        if mode == "keep_end" and kept > 1:
            assert after.ids == before.ids
    assert (result is whole) == (result == whole)
