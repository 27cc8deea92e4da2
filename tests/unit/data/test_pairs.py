"""Whole datasets: counts, allowances, limits, fingerprints."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune.data.pairs import (
    MAX_DROPPED_ROWS_KEPT,
    PairDataset,
    RowCounts,
    draw,
    load_pairs,
)
from preftune.data.splits import split_by_prompt
from preftune.data.table import (
    TokenizedRow,
    TokenRows,
    apply_limits,
    content_key,
    make_table,
)
from preftune.data.truncate import Limits
from preftune.errors import ConfigError, DataError
from preftune.schema import Completion, TokenizedExample
from tests.tiny import IM_END, chat_row, make_pairs, tiny_tokenizer, write_jsonl

DEFAULTS: dict[str, Any] = {
    "column_map": None,
    "max_length": None,
    "max_prompt_length": None,
    "truncation": "drop",
    "max_dropped_fraction": 0.01,
}


def load(path: Path, **changes: Any) -> PairDataset:
    return load_pairs(str(path), **({"tokenizer": tiny_tokenizer()} | DEFAULTS | changes))


def refuse(path: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **changes)
    return str(caught.value)


def test_rows_in_order_with_ids_and_counts(tmp_path: Path) -> None:
    data = load(write_jsonl(tmp_path / "d.jsonl", make_pairs(5)))
    assert [e.row_id for e in data.examples] == [f"d.jsonl:{i}" for i in range(1, 6)]
    assert data.name == str(tmp_path / "d.jsonl")
    assert data.counts == RowCounts(read=5, kept=5, dropped={}, truncated=0, dropped_rows=())
    assert {e.source for e in data.examples} == {data.name}


def test_formats_may_be_mixed_row_by_row(tmp_path: Path) -> None:
    rows = [*make_pairs(2), *make_pairs(2, chat=False), {"chosen": "\n\nHuman: q\n\nAssistant: a"}]
    rows[-1]["rejected"] = "\n\nHuman: q\n\nAssistant: b"
    assert load(write_jsonl(tmp_path / "d.jsonl", rows)).counts.kept == 5


def test_dropped_rows_are_counted_with_reason_and_id(tmp_path: Path) -> None:
    rows = make_pairs(8)
    rows[2] = chat_row("q", "same", "same")
    rows[5] = chat_row("q", "a", "")
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), max_dropped_fraction=0.25)
    assert data.counts.read == 8
    assert data.counts.kept == 6
    assert data.counts.dropped == {"equal_completions": 1, "empty_completion": 1}
    assert data.counts.dropped_rows == (
        ("d.jsonl:3", "equal_completions"),
        ("d.jsonl:6", "empty_completion"),
    )
    assert data.counts.as_dict() == {
        "read": 8,
        "kept": 6,
        "dropped": {"equal_completions": 1, "empty_completion": 1},
        "not_drawn": 0,
        "truncated": 0,
        "dropped_rows": [["d.jsonl:3", "equal_completions"], ["d.jsonl:6", "empty_completion"]],
    }


def test_more_dropped_rows_than_allowed(tmp_path: Path) -> None:
    rows = make_pairs(8)
    for i in (1, 2, 4, 6):
        rows[i] = chat_row("q", "same", "same")
    rows[7] = chat_row("q", "a", "")
    text = refuse(write_jsonl(tmp_path / "d.jsonl", rows), max_dropped_fraction=0.5)
    assert "5 of 8 rows (62.5%) cannot be trained on" in text
    assert "max_dropped_fraction allows 0.5" in text
    assert "- equal_completions: 4 rows (d.jsonl:2, d.jsonl:3, d.jsonl:5, …): chosen and" in text
    assert "- empty_completion: 1 row (d.jsonl:8): " in text
    assert "Clean these rows" in text
    assert "raise max_dropped_fraction to 0.63" in text
    assert load(tmp_path / "d.jsonl", max_dropped_fraction=0.63).counts.kept == 3


def test_exactly_the_allowed_fraction_is_allowed(tmp_path: Path) -> None:
    rows = make_pairs(10)
    rows[0] = chat_row("q", "same", "same")
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert load(path, max_dropped_fraction=0.1).counts.kept == 9
    refuse(path, max_dropped_fraction=0.09)


def test_dropped_row_ids_are_capped_and_counts_exact(tmp_path: Path) -> None:
    many = MAX_DROPPED_ROWS_KEPT + 5
    rows = [*make_pairs(1), *[chat_row("q", "same", "same")] * many]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), max_dropped_fraction=1.0)
    assert data.counts.dropped == {"equal_completions": many}
    assert len(data.counts.dropped_rows) == MAX_DROPPED_ROWS_KEPT


def test_rows_over_length_are_no_part_of_the_allowance(tmp_path: Path) -> None:
    rows = [chat_row("q", "a", "b"), *[chat_row("q", "a " * 50, "b")] * 9]
    rows.append(chat_row("q " * 50, "a", "b"))
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = load(path, max_length=30, max_prompt_length=20, max_dropped_fraction=0.0)
    assert data.counts.dropped == {"over_length": 9, "prompt_over_length": 1}
    assert (data.counts.read, data.counts.kept, data.counts.truncated) == (11, 1, 0)


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_truncated_rows_are_counted(tmp_path: Path, truncation: str) -> None:
    rows = [chat_row("q", "a", "b"), *[chat_row("q", "a " * 50, "b")] * 3]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), max_length=30, truncation=truncation)
    assert (data.counts.kept, data.counts.truncated, data.counts.dropped) == (4, 3, {})
    assert data.examples.is_cut.tolist() == [False, True, True, True]
    stop = tiny_tokenizer().convert_tokens_to_ids(IM_END)
    for example in data.examples[1:]:
        assert stop not in example.completions[0].ids
        assert example.completions[1].ids[-1] == stop


def test_nothing_left(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(3))
    text = refuse(path, max_length=4)
    assert "none of 3 rows can be trained on" in text
    assert "over_length: 3 rows" in text
    assert "max_length is 4" in text


def test_a_reason_comes_with_what_was_seen(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q ", "chosen": "a", "rejected": "b"}])
    assert "First: the tokens of prompt and answer merge at 'q '." in refuse(path)


def test_wrong_row_stops_at_once(tmp_path: Path) -> None:
    rows = [*make_pairs(3), {"prompt": 3, "chosen": "a", "rejected": "b"}, {"prompt": None}]
    text = refuse(write_jsonl(tmp_path / "d.jsonl", rows))
    assert text.startswith(f"d.jsonl:4 of dataset {tmp_path / 'd.jsonl'}: column 'prompt' is a num")


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(3))
    text = refuse(path, tokenizer=tiny_tokenizer(None))
    assert text.startswith(f"dataset {path}: the rows are chat messages")
    assert "--chat_template" in text


def test_column_map(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"q": "q", "y": " a", "n": " b", "margin": 1}])
    mapping = {"prompt": "q", "chosen": "y", "rejected": "n"}
    assert load(path, column_map=mapping).counts.kept == 1
    assert load(path, column_map=mapping).examples.margins.tolist() == [1.0]
    assert "which this row lacks" in refuse(path, column_map=mapping | {"margin": "by"})
    assert "did you mean 'chosen'?" in refuse(path, column_map={"chossen": "y"})


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(100))
    with path.open("a") as file:
        file.write("broken\n")
    assert load(path, max_rows=70).counts.read == 70
    assert "d.jsonl:101: not valid JSON" in refuse(path)
    with pytest.raises(ConfigError, match="max_rows is 0"):
        load(path, max_rows=0)


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(150))
    load(path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (150, None)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_limits_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_length is 1"):
        load(tmp_path / "absent.jsonl", max_length=1)


def test_weights_and_margins_are_vectors_of_the_rows(tmp_path: Path) -> None:
    rows = make_pairs(5)
    rows[0] |= {"weight": 2}
    rows[1] = chat_row("q", "same", "same", weight=7, margin=7)
    rows[3] |= {"weight": 0.0, "margin": -1.5}
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    examples = load(path, max_dropped_fraction=1.0).examples
    assert examples.weights.dtype == examples.margins.dtype == np.float64
    assert examples.weights.tolist() == [2, 1, 0, 1]
    np.testing.assert_array_equal(examples.margins, [np.nan, np.nan, -1.5, np.nan])
    assert [(e.weight, e.margin) for e in examples] == [(2, None), (1, None), (0, -1.5), (1, None)]
    assert examples.take(np.array([2, 2, 0])).weights.tolist() == [0, 0, 2]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9)), min_size=1, max_size=6),
    masked=st.sets(st.integers(0, 5)),
    max_length=st.none() | st.integers(3, 12),
)
def test_scored_tokens_are_counted_as_in_the_rows(
    lengths: list[tuple[int, int]], masked: set[int], max_length: int | None
) -> None:
    rows = []
    for index, (prompt, answer) in enumerate(lengths):
        mask = tuple(i % 3 != 1 for i in range(answer)) if index in masked else None
        sides = (Completion(tuple(range(answer)), mask), Completion((99, index)))
        roles = ("chosen", "rejected")
        rows.append(TokenizedExample(f"f:{index}", (1,) * prompt, sides, roles, "s", index))
    table = make_table([TokenizedRow(row) for row in rows], "s")
    limits = Limits(max_length, None, "keep_start")
    examples = TokenRows([table], ["s"], [apply_limits(table, "s", limits)[0]], limits)
    counted = [[answer.num_scored for answer in row.completions] for row in examples]
    assert examples.num_scored.tolist() == counted


class TestFingerprint:
    def test_same_rows_same_fingerprint_wherever_they_lie(self, tmp_path: Path) -> None:
        rows = make_pairs(4)
        one = load(write_jsonl(tmp_path / "a.jsonl", rows)).examples.fingerprint()
        two = load(write_jsonl(tmp_path / "b" / "c.jsonl", rows)).examples.fingerprint()
        assert one == two
        assert len(one) == 32

    def test_order_ids_masks_and_sides_tell(self, tmp_path: Path) -> None:
        rows = make_pairs(4)
        swapped = [rows[0] | {"chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}]
        many = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
        variants = [
            rows,
            rows[::-1],
            rows[:3],
            swapped + rows[1:],
            [rows[0] | {"chosen": many + rows[0]["chosen"]}, *rows[1:]],
        ]
        seen = {
            load(write_jsonl(tmp_path / f"{i}.jsonl", v)).examples.fingerprint()
            for i, v in enumerate(variants)
        }
        assert len(seen) == len(variants)

    def test_weights_and_margins_tell_and_where_there_are_none_nothing_changes(
        self, tmp_path: Path
    ) -> None:
        rows = make_pairs(3)
        variants = [
            rows,
            [rows[0] | {"weight": 0.5}, *rows[1:]],
            [rows[0], rows[1] | {"weight": 0.5}, rows[2]],
            [rows[0] | {"margin": 0.5}, *rows[1:]],
            [rows[0] | {"margin": 0.0}, *rows[1:]],
            [rows[0] | {"margin": 0.5, "weight": 0.5}, *rows[1:]],
        ]
        same = [row | {"weight": 1, "margin": None} for row in rows]
        prints = [
            load(write_jsonl(tmp_path / f"{i}.jsonl", v)).examples.fingerprint()
            for i, v in enumerate([*variants, same])
        ]
        assert len(set(prints)) == len(variants)
        assert prints[-1] == prints[0]

    def test_where_the_prompt_ends_tells(self) -> None:
        def row(prompt: tuple[int, ...], answer: tuple[int, ...]) -> TokenizedExample:
            sides = (Completion(answer), Completion((9,)))
            return TokenizedExample("f:1", prompt, sides, ("chosen", "rejected"), "s", 0)

        assert content_key(row((1, 2), (3,))) != content_key(row((1,), (2, 3)))

    def test_which_tokens_are_scored_tells(self) -> None:
        def row(scored: tuple[bool, ...] | None) -> TokenizedExample:
            sides = (Completion((1, 2), scored), Completion((9,)))
            return TokenizedExample("f:1", (5,), sides, ("chosen", "rejected"), "s", 0)

        masks = (None, (True, False), (False, True))
        assert len({content_key(row(mask)) for mask in masks}) == 3


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 10),
    max_length=st.none() | st.integers(2, 120),
    max_prompt_length=st.none() | st.integers(1, 60),
    truncation=st.sampled_from(["drop", "keep_start", "keep_end"]),
    chat=st.booleans(),
)
def test_limits_hold_for_every_row_kept(
    tmp_path: Path, seed: int, chat: bool, **limits: Any
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(12, seed, chat=chat))
    try:
        data = load(path, **limits, max_dropped_fraction=1.0)
    except DataError:  # none left; otherwise only equal answers may be lost
        assert limits["truncation"] == "drop" or limits["max_length"] < 20
        return
    counts = data.counts
    assert counts.read == 12 == counts.kept + sum(counts.dropped.values())
    for example in data.examples:
        assert max(example.lengths) <= (limits["max_length"] or 10_000)
        assert 1 <= len(example.prompt_ids) <= (limits["max_prompt_length"] or 10_000)
        assert all(c.num_scored >= 1 for c in example.completions)
        assert example.completions[0].ids != example.completions[1].ids


def test_a_thousand_pairs_load_in_seconds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(1000))
    start = time.process_time()
    assert load(path).counts.kept == 1000
    assert time.process_time() - start < 10


REAL = {
    "rasbt-polite": (985, 109),
    "pandalm-human": (718, 42),
    "tulu1-human": (612, 64),
    "qa-feedback-human": (2341, 275),
}


@pytest.mark.parametrize("name", REAL)
def test_real_pairs(name: str) -> None:
    root = os.environ.get("PREFTUNE_DATA")
    if not root:
        pytest.skip("PREFTUNE_DATA, the folder of real pairs, is not set")
    for split, number in zip(("train", "test"), REAL[name], strict=True):
        data = load(Path(root) / name, split=split)
        assert data.counts.read == number
        assert "not_a_prefix" not in data.counts.dropped
        assert data.counts.kept == number - sum(data.counts.dropped.values())


class TestMix:
    def sources(self, folder: Path) -> list[str]:
        rows = make_pairs(40)
        files = {"a": rows[:10], "b": rows[10:40]}
        return [str(write_jsonl(folder / f"{name}.jsonl", r)) for name, r in files.items()]

    def mix(self, folder: Path, *amounts: int | float | None, seed: int = 0) -> PairDataset:
        sources = list(zip(self.sources(folder), amounts, strict=True))
        return load_pairs(sources, tokenizer=tiny_tokenizer(), seed=seed)

    def test_parts_counts_and_all(self, tmp_path: Path) -> None:
        data = self.mix(tmp_path, None, 0.5)
        assert [s.num_drawn for s in data.sources] == [10, 15]
        assert data.counts.read == 40 == data.counts.kept + data.counts.not_drawn
        assert [s.counts.not_drawn for s in data.sources] == [0, 15]
        assert [e.row_id for e in data.examples][:10] == [f"a.jsonl:{i}" for i in range(1, 11)]
        lines = [int(e.row_id.split(":")[1]) for e in data.examples[10:]]
        assert lines == sorted(set(lines))
        assert {e.source for e in data.examples[10:]} == {self.sources(tmp_path)[1]}

    def test_one_row_and_one_whole_are_not_the_same(self, tmp_path: Path) -> None:
        assert [s.num_drawn for s in self.mix(tmp_path, 1, 1.0).sources] == [1, 30]

    def test_more_than_all_repeats_rows(self, tmp_path: Path) -> None:
        data = self.mix(tmp_path, 2.5, 45)
        assert len(data.examples) == 40
        repeated = data.repeated()
        numbers = Counter(e.row_id for e in repeated.examples)
        assert sorted(numbers.values()) == [1] * 15 + [2] * (5 + 15) + [3] * 5
        assert len(repeated.examples) == 25 + 45

    def test_the_seed_decides_and_larger_amounts_hold_smaller_ones(self, tmp_path: Path) -> None:
        def rows(amount: float, seed: int) -> set[str]:
            return {e.row_id for e in self.mix(tmp_path, 1, amount, seed=seed).examples}

        assert rows(0.3, 0) == rows(0.3, 0) != rows(0.3, 1)
        assert rows(0.3, 0) < rows(0.4, 0) < rows(25, 0)

    def test_a_prompt_in_two_sources_is_on_one_side(self, tmp_path: Path) -> None:
        rows = make_pairs(30, prompts=8)
        files = [write_jsonl(tmp_path / f"{i}.jsonl", rows[i::3]) for i in range(3)]
        mix = [(str(file), amount) for file, amount in zip(files, (1.0, 0.7, 2.0), strict=True)]
        data = load_pairs(mix, tokenizer=tiny_tokenizer())
        train, test = split_by_prompt(data, 0.3, 0)
        sides = [{e.prompt_key for e in side.repeated().examples} for side in (train, test)]
        assert not sides[0] & sides[1]
        assert all(sides)

    def test_every_source_is_checked_on_its_own(self, tmp_path: Path) -> None:
        good, _ = self.sources(tmp_path)
        bad = str(write_jsonl(tmp_path / "bad.jsonl", [chat_row("q", "x", "x"), *make_pairs(9)]))
        with pytest.raises(DataError, match=r"bad\.jsonl \(split train\): 1 of 10 rows"):
            load_pairs([(good, None), (bad, None)], tokenizer=tiny_tokenizer())


@given(num_rows=st.integers(1, 50), amount=st.integers(1, 200) | st.floats(0.001, 9))
def test_amounts(num_rows: int, amount: float) -> None:
    copies = draw(num_rows, amount, [0])
    wanted = amount if isinstance(amount, int) else max(1, round(amount * num_rows))
    assert copies.sum() == wanted
    assert copies.max() - copies.min() <= 1
