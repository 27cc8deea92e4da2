"""The quickstart's pairs: their number, their split, and that nothing trivial gives a side away.

Every statistic is computed from the generated rows, so a change to a phrase pool that lets length,
the first word or some token tell chosen from rejected fails here.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from preftune.data import quickstart_pairs as module
from preftune.data.quickstart_pairs import make_quickstart_pairs, write_quickstart_pairs

Row = dict
LENGTHS: dict[str, Callable[[str], int]] = {"words": lambda s: len(s.split()), "chars": len}


@cache
def pairs_of(seed: int) -> tuple[list[Row], list[Row]]:
    return make_quickstart_pairs(seed)


@pytest.fixture(params=[0, 1])
def splits(request: pytest.FixtureRequest) -> tuple[list[Row], list[Row]]:
    return pairs_of(request.param)


def chosen(row: Row) -> str:
    return row["chosen"][0]["content"]


def rejected(row: Row) -> str:
    return row["rejected"][0]["content"]


def first_word(text: str) -> str:
    return text.split()[0].lower()


def words_and_marks(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", text.lower())


def words_marks_and_contractions_apart(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def whitespace_words(text: str) -> list[str]:
    return text.lower().split()


def bigrams(text: str) -> list[tuple[str, str]]:
    tokens = words_and_marks(text)
    return list(pairwise(tokens))


def best_threshold_accuracy(positives: list[int], negatives: list[int]) -> float:
    """Accuracy of the best rule "at least t" or "less than t", found on the very data it scores."""
    total = len(positives) + len(negatives)
    best = 0.5
    for threshold in {*positives, *negatives}:
        right = sum(x >= threshold for x in positives) + sum(x < threshold for x in negatives)
        best = max(best, right / total, 1 - right / total)
    return best


def give_aways(rows: list[Row], tokens: Callable[[str], Iterable[Hashable]]) -> list[Hashable]:
    """Tokens in over 30 % of the answers of one side and in under 5 % of the other's."""
    counts: tuple[Counter, Counter] = Counter(), Counter()
    for row in rows:
        counts[0].update(set(tokens(chosen(row))))
        counts[1].update(set(tokens(rejected(row))))
    many, few = 0.30 * len(rows), 0.05 * len(rows)
    return [
        token
        for token in counts[0] | counts[1]
        for one, other in (counts, counts[::-1])
        if one[token] > many and other[token] < few
    ]


def test_give_away_is_found_when_there_is_one() -> None:
    rows = [{"chosen": [{"content": "Gladly: a b"}], "rejected": [{"content": "No. a b c"}]}] * 10
    found = give_aways(rows, words_and_marks)
    assert set(found) == {"gladly", ":", "no", ".", "c"}
    assert best_threshold_accuracy([5, 6, 7], [1, 2, 3]) == 1.0
    assert best_threshold_accuracy([1, 2, 3], [5, 6, 7]) == 1.0


def test_size_and_shape_of_rows(splits: tuple[list[Row], list[Row]]) -> None:
    train, heldout = splits
    assert len(train) >= 300
    assert len(heldout) >= 60
    for row in train + heldout:
        assert [m["role"] for m in row["prompt"]] == ["user"]
        assert [m["role"] for m in row["chosen"]] == ["assistant"]
        assert [m["role"] for m in row["rejected"]] == ["assistant"]
        assert row["source"] == f"preftune-quickstart/{row['topic']}"
        assert chosen(row) != rejected(row)


def test_topics_and_templates(splits: tuple[list[Row], list[Row]]) -> None:
    for rows, templates in zip(splits, (20, 6), strict=True):
        assert len({row["topic"] for row in rows}) >= 12
        assert len({row["template"] for row in rows}) >= templates


def test_prompts_are_distinct(splits: tuple[list[Row], list[Row]]) -> None:
    prompts = [row["prompt"][0]["content"] for rows in splits for row in rows]
    assert len(set(prompts)) == len(prompts)
    answers = [f(row) for rows in splits for row in rows for f in (chosen, rejected)]
    assert len(set(answers)) >= 0.98 * len(answers)


def test_heldout_shares_neither_template_nor_subject(splits: tuple[list[Row], list[Row]]) -> None:
    train, heldout = splits
    for key in ("template", "subject"):
        assert not {row[key] for row in train} & {row[key] for row in heldout}
    # The columns say the truth: a held-out subject is in no training prompt.
    train_prompts = " ".join(row["prompt"][0]["content"] for row in train)
    for row in heldout:
        assert row["subject"] not in train_prompts


@pytest.mark.parametrize("measure", LENGTHS)
def test_each_side_is_the_longer_one_half_the_time(
    splits: tuple[list[Row], list[Row]], measure: str
) -> None:
    length = LENGTHS[measure]
    for rows in splits:
        share = sum(length(chosen(r)) > length(rejected(r)) for r in rows) / len(rows)
        assert 0.45 <= share <= 0.55


@pytest.mark.parametrize("measure", LENGTHS)
def test_length_does_not_tell_the_side(splits: tuple[list[Row], list[Row]], measure: str) -> None:
    length = LENGTHS[measure]
    for rows in splits:
        good = [length(chosen(r)) for r in rows]
        bad = [length(rejected(r)) for r in rows]
        assert best_threshold_accuracy(good, bad) <= 0.6
        # The same answers as a pair, shown in either order: the difference and its negative.
        gaps = [a - b for a, b in zip(good, bad, strict=True)]
        assert best_threshold_accuracy(gaps, [-gap for gap in gaps]) <= 0.6


def test_answers_are_short(splits: tuple[list[Row], list[Row]]) -> None:
    for rows in splits:
        lengths = [len(f(r).split()) for r in rows for f in (chosen, rejected)]
        assert min(lengths) >= 12
        assert max(lengths) <= 40
        assert 20 <= sum(lengths) / len(lengths) <= 30


def test_first_word_does_not_tell_the_side(splits: tuple[list[Row], list[Row]]) -> None:
    train, heldout = splits
    votes: dict[str, int] = defaultdict(int)
    for row in train:
        votes[first_word(chosen(row))] += 1
        votes[first_word(rejected(row))] -= 1
    right = sum(
        (votes[first_word(chosen(r))] > 0) + (votes[first_word(rejected(r))] <= 0) for r in heldout
    )
    assert right / (2 * len(heldout)) <= 0.6
    # Ties could hide a give-away from the vote above; equal counts cannot.
    for rows in splits:
        assert Counter(first_word(chosen(r)) for r in rows) == Counter(
            first_word(rejected(r)) for r in rows
        )


@pytest.mark.parametrize(
    "tokens",
    [words_and_marks, words_marks_and_contractions_apart, bigrams],
)
def test_no_token_gives_a_side_away(
    splits: tuple[list[Row], list[Row]], tokens: Callable[[str], Iterable[Hashable]]
) -> None:
    train, heldout = splits
    for rows in (train, heldout, train + heldout):
        assert give_aways(rows, tokens) == []


def test_no_whitespace_word_gives_a_side_away(splits: tuple[list[Row], list[Row]]) -> None:
    train, heldout = splits
    assert give_aways(train + heldout, whitespace_words) == []


def test_text_is_well_formed(splits: tuple[list[Row], list[Row]]) -> None:
    for row in [row for rows in splits for row in rows]:
        for text in (row["prompt"][0]["content"], chosen(row), rejected(row)):
            assert text[0].isupper()
            assert text[-1] in ".?!"
            assert not re.search(r"[{}|/]|\s\s|\.\.|,,| [.,:!?]", text)
            # Each sentence starts with a capital letter.
            assert not re.search(r"[.?!] [a-z]", text)
            assert not re.search(r"\b(\w+) \1\b", text.lower())


def test_same_seed_same_rows_and_other_seed_other_rows() -> None:
    assert make_quickstart_pairs(0) == pairs_of(0)
    assert make_quickstart_pairs() == pairs_of(0)
    for rows, others in zip(pairs_of(0), pairs_of(1), strict=True):
        assert rows != others


def test_files_hold_the_rows(tmp_path: Path) -> None:
    paths = write_quickstart_pairs(tmp_path / "new" / "folder", seed=1)
    assert [path.name for path in paths] == ["train.jsonl", "heldout.jsonl"]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == sorted(paths)
    for path, rows in zip(paths, pairs_of(1), strict=True):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "make_quickstart_pairs", lambda seed: ([{"seed": seed}], []))
    train, heldout = write_quickstart_pairs(tmp_path, seed=0)

    def fail(handle: int) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_quickstart_pairs(tmp_path, seed=1)
    assert train.read_text() == '{"seed": 0}\n'
    assert sorted(tmp_path.iterdir()) == sorted([train, heldout])
    write_quickstart_pairs(tmp_path, seed=1)
    assert train.read_text() == '{"seed": 1}\n'
