"""What `preftune data inspect` counts and shows, against numbers worked by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune.data.inspection import numbers
from preftune.data.inspection.numbers import (
    LengthBias,
    SharedPrompts,
    duplicates,
    length_bias,
    overlap,
    quantiles,
    read_answers,
    shared_prompts,
)
from preftune.data.inspection.proving import count_proofs, rows_to_prove
from preftune.data.inspection.report import DatasetReport, Report, share
from preftune.data.inspection.shown import Mark, Piece, pieces, show_row, visible
from preftune.data.inspection.terminal import report_text
from preftune.data.inspection.truncation import truncation_cost
from preftune.data.pairs import PairDataset, load_pairs
from preftune.data.reasons import Dropped
from preftune.data.tokenized import Recipe
from preftune.data.transforms import load_transforms
from preftune.data.truncate import Limits, truncate
from preftune.errors import DataError
from preftune.schema import Completion, TokenizedExample
from tests.tiny import IM_END, chat_row, make_pairs, tiny_tokenizer, write_jsonl

NO_LIMITS = Limits(None, None, "drop")


def row(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    masks: tuple[Any, Any] = (None, None),
    row_id: str = "f:1",
) -> TokenizedExample:
    completions = (Completion(tuple(chosen), masks[0]), Completion(tuple(rejected), masks[1]))
    return TokenizedExample(
        row_id, tuple(prompt), completions, ("chosen", "rejected"), "s", sum(prompt)
    )


def u64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


# ---- numbers


def test_quantiles_are_values_that_occur() -> None:
    values = np.array([3, 1, 10, 2, 4, 5, 6, 7, 8, 9])
    # 10, 25, 50, 75, 90 and 99 % of ten values: the 1st, 3rd, 5th, 8th, 9th and 10th.
    assert quantiles(values) == [1, 1, 3, 5, 8, 9, 10, 10]
    assert quantiles(np.array([7])) == [7] * 8


def test_length_bias() -> None:
    bias = length_bias(np.array([5, 9, 4, 4, 1]), np.array([3, 2, 4, 6, 2]))
    assert bias == LengthBias(2, 1, 2, mean_difference=(2 + 7 + 0 - 2 - 1) / 5)
    assert bias.longer_wins == 0.5
    assert length_bias(np.array([2, 2, 2, 1]), np.array([1, 1, 1, 2])).longer_wins == 0.75


def test_shared_prompts() -> None:
    found = shared_prompts(u64(7, 8, 7, 7, 9, 8), np.array([10, 4, 10, 10, 3, 4]), 2)
    assert found == SharedPrompts(
        num_prompts=3,
        most_rows=3,
        num_sharing=5,
        tokens_per_answer=82,
        tokens_per_row=41,
        tokens_per_prompt=17,
    )
    assert shared_prompts(u64(7, 7), np.array([3, 3]), 1).tokens_per_answer == 6


def test_duplicates_and_pairs_in_both_orders() -> None:
    content = u64(1, 2, 1, 3, 4, 1)
    prompts = u64(7, 7, 7, 8, 8, 7)
    # 7: a > b thrice, b > a once; 8: a > b and c > b. The same answers to other prompts are others.
    answers = np.array([[1, 2], [2, 1], [1, 2], [1, 2], [3, 2], [1, 2]], dtype=np.uint64)
    found = duplicates(content, prompts, answers, np.ones(6, dtype=bool))
    assert (found.repeats.tolist(), found.originals.tolist()) == ([2, 5], [0, 0])
    assert (found.num_swapped, found.num_swapped_prompts, found.num_answers) == (4, 1, 5)


def test_both_orders_on_different_prompts_do_not_contradict() -> None:
    answers = np.array([[1, 2], [2, 1]], dtype=np.uint64)
    is_chosen = np.ones(2, dtype=bool)
    assert duplicates(u64(1, 2), u64(7, 8), answers, is_chosen).num_swapped == 0


def test_lone_answers_contradict_under_both_labels_of_one_prompt() -> None:
    prompts, answers = u64(7, 7, 7, 8, 8, 9), u64(1, 1, 2, 1, 1, 1)[:, None]
    is_chosen = np.array([True, False, True, True, True, False])
    # Answer 1 to prompt 7 is both; to prompt 8 it is chosen twice; to prompt 9 only rejected.
    found = duplicates(u64(1, 2, 3, 4, 4, 6), prompts, answers, is_chosen)
    assert (found.num_swapped, found.num_swapped_prompts, found.num_answers) == (2, 1, 4)
    assert (found.repeats.tolist(), found.originals.tolist()) == ([4], [3])


def test_overlap_of_prompts_and_answers() -> None:
    train = PairDataset.of("a", [row([1], [2, 3], [4]), row([5], [6], [7])]).examples
    test = PairDataset.of("b", [row([1], [7], [2, 3]), row([8], [9], [2])]).examples
    found = overlap(train, read_answers(train.table), test, read_answers(test.table))
    assert (found.num_prompts, found.num_answers) == (1, 2)


def test_answers_are_read_across_shards_and_dropped_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("preftune.data.tokenized.ROWS_PER_SHARD", 4)
    rows = make_pairs(10)
    rows[0]["chosen"][0]["content"] = rows[5]["rejected"][0]["content"] = " "
    rows[7]["chosen"] = [*rows[7]["chosen"], *rows[7]["prompt"], *rows[7]["rejected"]]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = load_pairs(str(path), tokenizer=tiny_tokenizer(), max_dropped_fraction=1.0)
    answers = read_answers(data.examples.table).take(data.examples.positions)
    assert len(data.examples) == 8
    for index, example in enumerate(data.examples):
        chosen, rejected = (completion.ids for completion in example.completions)
        same = [a == b for a, b in zip(chosen, rejected, strict=False)]
        lengths = [len(example.prompt_ids), len(chosen), len(rejected)]
        assert answers.lengths[index].tolist() == lengths
        assert answers.first_difference[index] == [*same, False].index(False)
        assert answers.keys[index, 0] == numbers.xxhash.xxh3_64_intdigest(
            np.array(chosen, np.int32).tobytes()
        )
    assert read_answers(data.examples.table).lengths[[0, 5]].sum() == 0


def masked(ids: list[int]) -> st.SearchStrategy[Any]:
    masks = st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)).filter(any).map(tuple)
    return st.tuples(st.just(ids), st.none() | masks)


ANSWER = st.lists(st.integers(1, 2), min_size=1, max_size=7).flatmap(masked)
ROW = st.tuples(st.integers(1, 8), ANSWER, ANSWER).filter(lambda parts: parts[1][0] != parts[2][0])


@given(
    parts=st.lists(ROW, min_size=1, max_size=5),
    max_length=st.none() | st.integers(2, 16),
    max_prompt_length=st.none() | st.integers(1, 8),
    truncation=st.sampled_from(["drop", "keep_start", "keep_end"]),
)
def test_the_cost_of_truncation_is_what_truncation_does(
    parts: Any, max_length: int | None, max_prompt_length: int | None, truncation: Any
) -> None:
    limits = Limits(max_length, max_prompt_length, truncation)
    rows = [row([9] * n, a, b, masks=(m, k)) for n, (a, m), (b, k) in parts]
    cost = truncation_cost(read_answers(PairDataset.of("d", rows).examples.table), limits)
    results = [truncate(example, limits) for example in rows]
    kept = [result for result in results if not isinstance(result, Dropped)]

    def tokens(examples: list[TokenizedExample]) -> tuple[int, int]:
        answers = sum(len(c.ids) for e in examples for c in e.completions)
        return answers, sum(len(e.prompt_ids) for e in examples)

    assert cost.num_rows == len(rows)
    assert cost.num_dropped == len(rows) - len(kept)
    assert cost.num_over == sum(r is not e for r, e in zip(results, rows, strict=True))
    assert (cost.answer_tokens, cost.prompt_tokens) == tokens(rows)
    left = cost.answer_tokens - cost.answer_tokens_lost
    assert (left, cost.prompt_tokens - cost.prompt_tokens_lost) == tokens(kept)


@given(
    parts=st.lists(st.tuples(st.integers(1, 8), ANSWER), min_size=1, max_size=5),
    max_length=st.integers(2, 16),
    truncation=st.sampled_from(["drop", "keep_start", "keep_end"]),
)
def test_the_cost_of_truncation_of_rows_of_one_answer(
    parts: Any, max_length: int, truncation: Any
) -> None:
    limits = Limits(max_length, None, truncation)
    rows = [
        TokenizedExample("f:1", (9,) * n, (Completion(tuple(a), m),), ("rejected",), "s", n)
        for n, (a, m) in parts
    ]
    cost = truncation_cost(read_answers(PairDataset.of("d", rows).examples.table), limits)
    kept = [r for row in rows if isinstance(r := truncate(row, limits), TokenizedExample)]
    assert cost.num_dropped == len(rows) - len(kept)
    left = cost.answer_tokens - cost.answer_tokens_lost
    assert left == sum(len(c.ids) for e in kept for c in e.completions)


def test_weight_and_margin_are_shown_where_a_row_has_them() -> None:
    def note(said: str, **columns: float) -> str:
        whole = replace(row([1], [2], [3]), **columns)
        return show_row(lambda ids: "x" * len(ids), whole, whole, NO_LIMITS, said).note

    assert note("") == ""
    assert note("", weight=1.0) == ""
    assert note("", weight=0.0) == "weight 0"
    assert note("Cut.", weight=2.5, margin=0.0) == "Cut. weight 2.5, margin 0"


def test_shares_are_not_rounded_to_all_or_nothing() -> None:
    cases = [(0, 5), (1, 100_000), (1, 3), (99_999, 100_000), (5, 5)]
    assert [share(*case) for case in cases] == ["0.0%", "<0.1%", "33.3%", ">99.9%", "100.0%"]


# ---- rows token by token


def decode(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids, skip_special_tokens=False)


@given(text=st.text(max_size=12))
def test_pieces_join_to_the_text(text: str) -> None:
    ids = tiny_tokenizer()("Paris" + text)["input_ids"]
    found = list(pieces(decode, ids, [Mark.TRAINED] * len(ids)))
    assert "".join(piece.text for piece in found) == decode(ids)
    assert [i for piece in found for i in piece.ids] == ids


def test_tokens_that_make_one_character_stay_together() -> None:
    ids = tiny_tokenizer()("a😀b")["input_ids"]
    assert len(ids) == 6
    marks = [Mark.CONTEXT] + [Mark.TRAINED] * 5
    assert list(pieces(decode, ids, marks)) == [
        Piece("a", (ids[0],), Mark.CONTEXT),
        Piece("😀", tuple(ids[1:5]), Mark.TRAINED),
        Piece("b", (ids[5],), Mark.TRAINED),
    ]


@pytest.mark.parametrize(
    ("truncation", "prompt", "chosen"),
    [
        ("keep_start", "CCXXX", "TXX"),  # room for 3: two of the prompt, one token an answer
        ("keep_end", "XXXXC", "TTX"),  # the longer answer has 4 tokens: one of the prompt stays
    ],
)
def test_what_a_limit_cuts_is_marked(truncation: Any, prompt: str, chosen: str) -> None:
    limits = Limits(3, None, truncation)
    whole = row([1, 2, 3, 4, 5], [6, 7, 8], [9, 7, 8, 8])
    cut = truncate(whole, limits)
    assert isinstance(cut, TokenizedExample)
    shown = show_row(lambda ids: "x" * len(ids), whole, cut, limits, "")
    letter = {Mark.CONTEXT: "C", Mark.TRAINED: "T", Mark.CUT: "X"}
    of_side = ["".join(letter[piece.mark] for piece in side.pieces) for side in shown.sides]
    assert of_side[:2] == [prompt, chosen]
    lost = chosen.count("X")
    kept = 3 - lost
    assert shown.sides[1].summary.startswith(f"chosen: {kept} token")
    assert shown.sides[1].summary.endswith(f"{kept} of them trained; {lost} cut off")


def test_turns_of_the_user_inside_an_answer_are_not_trained() -> None:
    whole = row([1], [2, 3, 4], [5], masks=((True, False, True), None))
    shown = show_row(lambda ids: "x" * len(ids), whole, whole, NO_LIMITS, "")
    marks = [piece.mark for piece in shown.sides[1].pieces]
    assert marks == [Mark.TRAINED, Mark.CONTEXT, Mark.TRAINED]


def test_nothing_in_the_data_can_steer_a_terminal() -> None:
    assert visible("a\n\tb\x1b[31m\r\x00\x7f\x9b\u202e\u200b") == (
        "a↵\n⇥b␛[31m␍␀\\u007f\\u009b\\u202e\\u200b"
    )
    assert visible("naïve — 👩‍👧 日本") == "naïve — 👩‍👧 日本"


def test_colours_take_the_place_of_brackets() -> None:
    whole = row([1, 2], [3, 4], [5])
    shown = show_row(lambda ids: "x" * len(ids), whole, whole, NO_LIMITS, "")
    dataset = DatasetReport("Training", "d", 1, "pairs", (shown,), (), ())
    report = Report((("model", "m"),), (dataset,), None, (), is_whole=False)
    plain, coloured = (report_text(report, colours=colours) for colours in (False, True))
    assert "    ⟦x¦x⟧\n" in plain.plain
    assert "    xx\n" in coloured.plain
    styled = [coloured.plain[a:b] for a, b, style in coloured.spans if "on" in str(style).split()]
    assert styled == ["x", "x", "x"]  # each trained token by itself


def test_a_terminal_shows_the_ends_of_long_texts_unless_asked() -> None:
    whole = row(list(range(1, 401)), [500], [501])
    shown = show_row(lambda ids: "x" * len(ids), whole, whole, NO_LIMITS, "")
    dataset = DatasetReport("Training", "d", 1, "pairs", (shown,), (), ())
    short, long = (
        report_text(Report((("model", "m"),), (dataset,), None, (), is_whole), colours=False).plain
        for is_whole in (False, True)
    )
    assert "x" * 250 + " ⋯ 50 tokens ⋯ " + "x" * 100 + "\n" in short
    assert "x" * 400 + "\n" in long


# ---- proofs


def load(
    path: Path, tokenizer: Any, transforms: tuple[str, ...] = ()
) -> tuple[PairDataset, Recipe]:
    data = load_pairs(str(path), tokenizer=tokenizer, transforms=transforms)
    return data, Recipe(tokenizer, {}, load_transforms(transforms))


def test_every_row_is_proved_once_against_its_own_text(tmp_path: Path) -> None:
    data, recipe = load(write_jsonl(tmp_path / "d.jsonl", make_pairs(12)), tiny_tokenizer())
    side = data.take(np.array([7, 2, 11]))
    done: list[int] = []
    counts = count_proofs(side, np.arange(3), recipe, done.append)
    assert counts.held == dict.fromkeys(["prefix", "bos", "stop", "round_trip", "verbatim"], 3)
    assert (counts.num_rows, counts.of_rows, done) == (3, 3, [1, 2, 3])


def test_a_template_that_trims_answers_fails_one_proof_by_row(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'].strip()"
    )
    rows = [chat_row(f"q{i}?", "  padded" if i in (1, 3) else "yes", "no") for i in range(5)]
    data, recipe = load(write_jsonl(tmp_path / "d.jsonl", rows), tokenizer)
    counts = count_proofs(data, np.arange(5), recipe)
    assert counts.held["verbatim"] == 3
    assert counts.failing["verbatim"] == ("d.jsonl:2", "d.jsonl:4")
    assert counts.held["round_trip"] == 5


def test_proofs_look_at_rows_before_any_cut(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(6))
    tokenizer = tiny_tokenizer()
    data = load_pairs(str(path), tokenizer=tokenizer, max_length=20, truncation="keep_start")
    assert data.examples.is_cut.any()
    counts = count_proofs(data, np.arange(6), Recipe(tokenizer, {}, load_transforms(())))
    assert set(counts.held.values()) == {6}


def test_rows_that_changed_since_they_were_tokenised_are_told(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(6))
    data, recipe = load(path, tiny_tokenizer())
    write_jsonl(path, make_pairs(4))
    with pytest.raises(DataError, match="not those that were tokenised"):
        count_proofs(data, np.arange(6), recipe)


def test_a_sample_of_rows_to_prove_follows_the_seed() -> None:
    assert rows_to_prove(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    some = rows_to_prove(1000, 50, seed=0)
    assert len(set(some.tolist())) == 50
    assert (np.diff(some) > 0).all()
    assert (some == rows_to_prove(1000, 50, seed=0)).all()
    assert (some != rows_to_prove(1000, 50, seed=1)).any()


def test_the_stop_token_is_named_as_it_is_written() -> None:
    ids = tiny_tokenizer()(f"Paris{IM_END}")["input_ids"]
    assert list(pieces(decode, ids, [Mark.TRAINED] * len(ids)))[-1].text == IM_END
