"""Rows of one labelled answer, and pairs taken apart: formats, counts, cache, proofs, splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preftune.data.formats import parse_answers, parse_row
from preftune.data.inspection.numbers import read_answers
from preftune.data.inspection.proving import count_proofs
from preftune.data.inspection.report import number_tables, truncation_costs
from preftune.data.pairs import PairDataset, load_pairs
from preftune.data.reasons import Dropped, DropReason
from preftune.data.splits import split_by_prompt
from preftune.data.tokenized import Recipe
from preftune.data.transforms import load_transforms
from preftune.errors import DataError
from preftune.schema import Example
from tests.tiny import chat_row, make_pairs, tiny_tokenizer, write_jsonl


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parse(raw: dict[str, Any], **column_map: str) -> list[Example | Dropped]:
    return parse_answers("d.jsonl:7", raw, dataset="set", column_map=column_map)


def only(raw: dict[str, Any], **column_map: str) -> Example:
    (example,) = parse(raw, **column_map)
    assert isinstance(example, Example)
    assert example.row_id == "d.jsonl:7"
    return example


def refuse(raw: dict[str, Any], **column_map: str) -> str:
    with pytest.raises(DataError) as caught:
        parse(raw, **column_map)
    assert str(caught.value).startswith("d.jsonl:7 of dataset set: ")
    return str(caught.value)


def load(path: Path, **changes: Any) -> PairDataset:
    settings = {"tokenizer": tiny_tokenizer(), "kind": "labelled", "max_dropped_fraction": 1.0}
    return load_pairs(str(path), **(settings | changes))


TEXT = {"prompt": "q", "completion": " a", "label": True}
TOOL = {"type": "function", "function": {"name": "f"}}


class TestFormat:
    @pytest.mark.parametrize(
        ("raw", "prompt", "completion"),
        [
            pytest.param({"prompt": "q", "completion": " a"}, "q", " a", id="text"),
            pytest.param(
                {"prompt": [user("q")], "completion": [assistant("a")]},
                [user("q")],
                [assistant("a")],
                id="messages (TRL's layout)",
            ),
            pytest.param(
                {"prompt": "q", "completion": [assistant("a")]},
                [user("q")],
                [assistant("a")],
                id="prompt text, answer messages",
            ),
            pytest.param(
                {"prompt": [user("q")], "completion": [user("q"), assistant("a")]},
                [user("q")],
                [assistant("a")],
                id="the answer repeats the prompt's messages",
            ),
            pytest.param(
                {"prompt": "q", "completion": [user("p"), user("q"), assistant("a")]},
                [user("p"), user("q")],
                [assistant("a")],
                id="the answer repeats a text prompt behind other messages",
            ),
        ],
    )
    def test_layouts(self, raw: dict[str, Any], prompt: Any, completion: Any) -> None:
        example = only(raw | {"label": True})
        assert (example.prompt, example.completions) == (prompt, (completion,))

    @pytest.mark.parametrize(
        ("label", "role"),
        [(True, "chosen"), (False, "rejected"), (1, "chosen"), (0, "rejected")],
    )
    def test_labels(self, label: Any, role: str) -> None:
        assert only(TEXT | {"label": label}).roles == (role,)

    @pytest.mark.parametrize(
        ("label", "says"),
        [
            ("true", "column 'label' is text ('true')"),
            (2, "column 'label' is a number (2)"),
            (-1, "column 'label' is a number (-1)"),
            (1.0, "column 'label' is a number (1.0)"),
            ([True], "column 'label' is a list ([True])"),
            (None, "column 'label' is null"),
        ],
    )
    def test_what_is_no_label(self, label: Any, says: str) -> None:
        assert says in refuse(TEXT | {"label": label})

    @pytest.mark.parametrize(
        ("raw", "says"),
        [
            ({"prompt": "q", "completion": "a"}, "column 'label' is missing"),
            ({"prompt": "q", "label": True}, "column 'completion' is missing"),
            ({"completion": "a", "label": True}, "column 'prompt' is missing"),
            (TEXT | {"completion": 3}, "column 'completion' is a number (3)"),
            (TEXT | {"prompt": [user("q")]}, "'prompt' is messages and 'completion' is text"),
            (TEXT | {"tools": [TOOL]}, "no chat template is applied"),
            (TEXT | {"weight": -1}, "column 'weight' is a number (-1)"),
        ],
    )
    def test_wrong_rows(self, raw: dict[str, Any], says: str) -> None:
        assert says in refuse(raw)

    def test_columns_under_other_names(self) -> None:
        raw = {"q": "q", "a": " a", "good": False, "w": 2, "source": "s"}
        names = {"prompt": "q", "completion": "a", "label": "good", "weight": "w"}
        example = only(raw, **names)
        assert (example.completions, example.roles) == ((" a",), ("rejected",))
        assert (example.weight, example.source) == (2.0, "s")

    def test_a_text_answer_that_repeats_its_prompt_is_dropped(self) -> None:
        raw = {"prompt": "Why?", "completion": "Why? Because.", "label": True}
        assert parse(raw) == [Dropped("d.jsonl:7", DropReason.PROMPT_REPEATED)]

    @pytest.mark.parametrize(
        "raw",
        [
            {"prompt": "q", "chosen": " a", "rejected": " b"},
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            chat_row("q", "a", "b", tools=[TOOL]),
            # A pair it is, whatever else the row has.
            chat_row("q", "a", "b", completion="c", label=False),
        ],
        ids=["text", "conversations", "transcripts", "messages", "both"],
    )
    def test_pairs_are_taken_apart(self, raw: dict[str, Any]) -> None:
        raw |= {"weight": 3, "margin": 0.5}
        pair = parse_row("d.jsonl:7", raw, dataset="set", column_map={})
        assert isinstance(pair, Example)
        chosen, rejected = parse(raw)
        for example, role, answer in zip(
            (chosen, rejected), ("chosen", "rejected"), pair.completions, strict=True
        ):
            assert isinstance(example, Example)
            assert example.row_id == f"d.jsonl:7 ({role})"
            assert (example.completions, example.roles) == ((answer,), (role,))
            assert (example.prompt, example.tools) == (pair.prompt, pair.tools)
            assert (example.weight, example.margin) == (3.0, 0.5)

    def test_both_answers_of_a_pair_that_cannot_be_read_are_dropped(self) -> None:
        raw = {"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}
        assert parse(raw) == [
            Dropped("d.jsonl:7 (chosen)", DropReason.PROMPT_REPEATED),
            Dropped("d.jsonl:7 (rejected)", DropReason.PROMPT_REPEATED),
        ]

    def test_where_pairs_are_read_a_lone_answer_points_to_the_losses_that_take_it(self) -> None:
        with pytest.raises(DataError) as caught:
            parse_row("d.jsonl:7", TEXT, dataset="set", column_map={})
        text = str(caught.value)
        assert "no 'chosen', and the loss reads pairs (columns: prompt, completion, label)" in text
        assert "--loss_type kto or bco" in text


class TestCounts:
    ROWS = (
        chat_row("q1", "a", "b"),
        {"prompt": [user("q2")], "completion": [assistant("c")], "label": False, "weight": 0.5},
        chat_row("q3", "same", "same"),
        chat_row("q4", "d", " "),
        {"prompt": "text?", "completion": " e", "label": 1},
        {"prompt": [user("q5")], "completion": [assistant("")], "label": True},
    )

    def test_each_answer_is_a_row(self, tmp_path: Path) -> None:
        data = load(write_jsonl(tmp_path / "d.jsonl", self.ROWS))
        assert [(e.row_id, e.roles) for e in data.examples] == [
            ("d.jsonl:1 (chosen)", ("chosen",)),
            ("d.jsonl:1 (rejected)", ("rejected",)),
            ("d.jsonl:2", ("rejected",)),
            ("d.jsonl:4 (chosen)", ("chosen",)),
            ("d.jsonl:5", ("chosen",)),
        ]
        counts = data.counts
        assert (counts.read, counts.kept) == (9, 5)
        assert counts.dropped == {"empty_completion": 2, "equal_completions": 2}
        assert counts.dropped_rows == (
            ("d.jsonl:3 (chosen)", "equal_completions"),
            ("d.jsonl:3 (rejected)", "equal_completions"),
            ("d.jsonl:4 (rejected)", "empty_completion"),
            ("d.jsonl:6", "empty_completion"),
        )
        examples = data.examples
        assert (examples.num_answers, data.unit, data.num_text_rows) == (1, "rows", 1)
        assert examples.roles.tolist() == ["chosen", "rejected", "rejected", "chosen", "chosen"]
        assert examples.weights.tolist() == [1, 1, 0.5, 1, 1]
        assert examples.lengths.shape == (5, 2)
        assert examples.num_scored.tolist() == [[len(e.completions[0].ids)] for e in examples]
        assert examples.num_tokens == sum(e.lengths[0] for e in examples)

    def test_answers_have_the_tokens_that_they_have_in_a_pair(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "d.jsonl", [*make_pairs(6), *make_pairs(3, chat=False)])
        pairs = load(path, kind="pairs").examples
        alone = load(path).examples
        assert [(e.prompt_ids, e.completions[0]) for e in alone] == [
            (e.prompt_ids, answer) for e in pairs for answer in e.completions
        ]
        assert alone.prompt_keys.tolist() == np.repeat(pairs.prompt_keys, 2).tolist()

    def test_a_dropped_row_of_a_transform_counts_once(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "unpaired_rows.py").write_text(
            "from preftune import DropRow\n"
            "def drop_q0(row):\n"
            "    if row['prompt'][0]['content'].startswith('0 '): raise DropRow('q0')\n"
            "    return row\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        path = write_jsonl(tmp_path / "d.jsonl", make_pairs(3))
        counts = load(path, transforms=["unpaired_rows:drop_q0"]).counts
        assert (counts.read, counts.kept, counts.dropped) == (5, 4, {"dropped_by_transform": 1})

    def test_amounts_of_a_mix_draw_answers(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "d.jsonl", make_pairs(10))
        data = load_pairs([(str(path), 0.25)], tokenizer=tiny_tokenizer(), kind="labelled")
        assert (data.counts.read, data.counts.kept, data.counts.not_drawn) == (20, 5, 15)

    def test_max_rows_and_progress_count_what_the_file_holds(self, tmp_path: Path) -> None:
        paths = [write_jsonl(tmp_path / f"{i}.jsonl", make_pairs(70, seed=i)) for i in range(2)]
        seen: list[tuple[int, int | None]] = []
        mix = [(str(path), None) for path in paths]
        report: Any = lambda done, total: seen.append((done, total))  # noqa: E731
        data = load_pairs(mix, tokenizer=tiny_tokenizer(), kind="labelled", progress=report)
        assert data.counts.read == 280
        assert seen[-1] == (140, None)
        assert load(paths[0], max_rows=5).counts.read == 10

    def test_both_answers_of_a_prompt_are_on_one_side_of_a_split(self, tmp_path: Path) -> None:
        data = load(write_jsonl(tmp_path / "d.jsonl", make_pairs(10)))
        train, test = split_by_prompt(data, 6, seed=0)
        assert (len(train.examples), len(test.examples)) == (14, 6)
        assert not np.isin(test.examples.prompt_keys, train.examples.prompt_keys).any()


def test_pairs_and_answers_never_share_a_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(4))
    cache = tmp_path / "cache"
    for kind, number in (("pairs", 4), ("labelled", 8)) * 2:
        assert load(path, kind=kind, cache=cache).counts.read == number
    assert len(list(cache.iterdir())) == 2
    assert load(path, cache=cache).reused


def test_the_label_is_in_the_fingerprint(tmp_path: Path) -> None:
    prints = {
        load(
            write_jsonl(tmp_path / f"{label}.jsonl", [TEXT | {"label": label}])
        ).examples.fingerprint()
        for label in (True, False)
    }
    assert len(prints) == 2


@pytest.mark.parametrize("wanted", [[0, 1, 2, 3, 4, 5, 6], [3], [6, 1]])
def test_proofs_find_each_answer_in_its_source(tmp_path: Path, wanted: list[int]) -> None:
    lone = {"prompt": [user("q")], "completion": [assistant("a")], "label": True}
    rows = [make_pairs(1)[0], lone, *make_pairs(2, seed=1)]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows))
    recipe = Recipe(tiny_tokenizer(), {}, load_transforms(()), kind="labelled")
    done: list[int] = []
    counts = count_proofs(data, np.sort(wanted), recipe, done.append)
    assert set(counts.held.values()) == {len(wanted)}
    assert (len(data.examples), len(done)) == (7, len(wanted))


def test_proofs_of_answers_whose_source_changed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_pairs(4))
    data = load(path)
    write_jsonl(path, make_pairs(3))
    recipe = Recipe(tiny_tokenizer(), {}, load_transforms(()), kind="labelled")
    with pytest.raises(DataError, match="not those that were tokenised"):
        count_proofs(data, np.arange(8), recipe)


def test_all_tables_of_an_inspection_take_one_answer(tmp_path: Path) -> None:
    rows = [TEXT, TEXT | {"label": False}, TEXT, TEXT | {"completion": " bbb"}]
    data = load(write_jsonl(tmp_path / "d.jsonl", rows), max_length=40)
    answers = read_answers(data.examples.table)
    lengths, labels, prompts, repeats = number_tables(data, answers)
    assert [row[0] for row in lengths.rows] == ["prompt", "chosen", "rejected", "longest side"]
    assert [row[1:3] for row in labels.rows] == [("3", "75.0%"), ("1", "25.0%")]
    assert ("rows a prompt", "4.00 on average, 4 at most") in prompts.rows
    assert repeats.rows[0] == ("rows equal to an earlier one", "1", "d.jsonl:3 = d.jsonl:1")
    assert repeats.rows[1] == ("rows whose answer also has the other label", "3", "on 1 prompts")
    assert repeats.rows[2][1] == "2"
    assert truncation_costs(answers, data.examples.limits)[0].num_rows == 4
