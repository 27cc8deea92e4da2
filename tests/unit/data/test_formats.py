"""Raw rows -> examples: every layout, and what is wrong with rows that have none."""

import copy
import math
from typing import Any

import pytest

from preftune.data.formats import RowFormat, check_column_map, parse_row
from preftune.data.reasons import Dropped, DropReason
from preftune.errors import DataError
from preftune.schema import Example


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def parse(raw: dict[str, Any], **column_map: str) -> Example:
    before = copy.deepcopy(raw)
    example = parse_row("train.jsonl:7", raw, dataset="set", column_map=column_map)
    assert isinstance(example, Example)
    assert raw == before, "a format changed the row it was given"
    assert example.roles == ("chosen", "rejected")
    return example


def refuse(raw: dict[str, Any], **column_map: str) -> str:
    with pytest.raises(DataError) as caught:
        parse_row("train.jsonl:7", raw, dataset="set", column_map=column_map)
    text = str(caught.value)
    assert text.startswith("train.jsonl:7 of dataset set: ")
    assert ";" in text, "an error ends with what to do"
    return text


@pytest.mark.parametrize(
    ("raw", "prompt", "completions"),
    [
        pytest.param(
            {"prompt": "Q", "chosen": " a", "rejected": " b"},
            "Q",
            (" a", " b"),
            id="text",
        ),
        pytest.param(
            {
                "prompt": [system("s"), user("q")],
                "chosen": [assistant("a")],
                "rejected": [assistant("b")],
            },
            [system("s"), user("q")],
            ([assistant("a")], [assistant("b")]),
            id="messages",
        ),
        pytest.param(
            {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            [user("q")],
            ([assistant("a")], [assistant("b")]),
            id="prompt text, answers messages",
        ),
        pytest.param(
            {"prompt": "q", "chosen": [assistant("a")], "rejected": "b"},
            [user("q")],
            ([assistant("a")], [assistant("b")]),
            id="one answer messages, one text",
        ),
        pytest.param(
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [user("q")],
            ([assistant("a")], [assistant("b")]),
            id="answers repeat the prompt text (ultrafeedback_binarized)",
        ),
        pytest.param(
            {
                "prompt": "q",
                "chosen": [system("s"), user("q"), assistant("a")],
                "rejected": [system("s"), user("q"), assistant("b")],
            },
            [system("s"), user("q")],
            ([assistant("a")], [assistant("b")]),
            id="answers repeat it after a system message",
        ),
        pytest.param(
            {
                "prompt": [user("q"), assistant("r"), user("s")],
                "chosen": [user("q"), assistant("r"), user("s"), assistant("a")],
                "rejected": [assistant("b")],
            },
            [user("q"), assistant("r"), user("s")],
            ([assistant("a")], [assistant("b")]),
            id="one answer repeats the prompt messages",
        ),
        pytest.param(
            {
                "chosen": [user("q"), assistant("r"), user("s"), assistant("a")],
                "rejected": [user("q"), assistant("r"), user("s"), assistant("b")],
            },
            [user("q"), assistant("r"), user("s")],
            ([assistant("a")], [assistant("b")]),
            id="two conversations",
        ),
        pytest.param(
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q")]},
            [user("q")],
            ([assistant("a")], []),
            id="one conversation begins the other: an empty answer, dropped later",
        ),
        pytest.param(
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("a")]},
            [],
            ([user("q"), assistant("a")], [user("p"), assistant("a")]),
            id="nothing in common: an empty prompt, dropped later",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: A\n\nHuman: so?\n\nAssistant: yes",
                "rejected": "\n\nHuman: hi\n\nAssistant: A\n\nHuman: so?\n\nAssistant: you",
            },
            "\n\nHuman: hi\n\nAssistant: A\n\nHuman: so?\n\nAssistant:",
            (" yes", " you"),
            id="HH transcripts",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: same",
                "rejected": "\n\nHuman: hi\n\nAssistant: same",
            },
            "\n\nHuman: hi\n\nAssistant:",
            (" same", " same"),
            id="HH, equal answers",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: hi\n\nAssistant: a",
                "rejected": "\n\nHuman: ho\n\nAssistant: b",
            },
            "",
            ("\n\nHuman: hi\n\nAssistant: a", "\n\nHuman: ho\n\nAssistant: b"),
            id="HH, different questions: an empty prompt, dropped later",
        ),
        pytest.param(
            {
                "prompt": None,
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            [user("q")],
            ([assistant("a")], [assistant("b")]),
            id="a null prompt, as Arrow fills it in, is no prompt",
        ),
    ],
)
def test_layouts(raw: dict[str, Any], prompt: Any, completions: Any) -> None:
    example = parse(raw)
    assert (example.prompt, example.completions) == (prompt, completions)


def test_hh_answer_with_a_human_turn_is_dropped_not_trained_as_the_assistants() -> None:
    raw = {
        "chosen": "\n\nHuman: hi\n\nAssistant: a\n\nHuman: more\n\nAssistant: b",
        "rejected": "\n\nHuman: hi\n\nAssistant: c",
    }
    assert parse_row("f:1", raw, dataset="d", column_map={}) == Dropped(
        "f:1", DropReason.USER_TURN_IN_ANSWER
    )


def test_a_prompt_that_text_answers_repeat_is_not_trained_twice() -> None:
    raw = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi you"}
    assert parse_row("f:1", raw, dataset="d", column_map={}) == Dropped(
        "f:1", DropReason.PROMPT_REPEATED
    )


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Bye"},
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi"},
        {"prompt": " ", "chosen": " a", "rejected": " b"},
    ],
    ids=["one answer", "an answer that is the prompt", "a blank prompt"],
)
def test_answers_that_only_look_like_the_prompt_are_kept(raw: dict[str, Any]) -> None:
    parse(raw)


def test_formats_are_all_reachable() -> None:
    assert {f.value for f in RowFormat} == {
        "prompt_pair",
        "conversations",
        "transcripts",
        "unpaired",
        "supervised",
    }


def test_source_is_the_dataset_unless_the_row_names_one() -> None:
    raw = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert parse(raw).source == "set"
    assert parse(raw | {"source": "ultra"}).source == "ultra"
    assert "'source' is a number (3)" in refuse(raw | {"source": 3})


def test_column_map_names_the_files_columns() -> None:
    raw = {"question": "q", "good": "a", "bad": "b", "prompt": "not this one"}
    example = parse(raw, prompt="question", chosen="good", rejected="bad")
    assert (example.prompt, example.completions) == ("q", ("a", "b"))


def test_column_map_to_an_absent_column() -> None:
    text = refuse({"q": "q", "chosen": "a", "rejected": "b"}, prompt="question")
    assert "'prompt' is called 'question', which this row lacks" in text
    assert "columns: q, chosen, rejected" in text


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    ],
    ids=["text", "conversations", "transcripts", "messages"],
)
def test_weight_and_margin_are_read_in_every_layout(raw: dict[str, Any]) -> None:
    example = parse(raw)
    assert (example.weight, example.margin) == (1.0, None)
    example = parse(raw | {"weight": None, "margin": None})
    assert (example.weight, example.margin) == (1.0, None)
    example = parse(raw | {"weight": 0, "margin": -2})
    assert (example.weight, example.margin) == (0.0, -2.0)
    assert isinstance(example.weight, float)
    assert isinstance(example.margin, float)
    example = parse(raw | {"w": 2.5, "by": 0}, weight="w", margin="by")
    assert (example.weight, example.margin) == (2.5, 0.0)


@pytest.mark.parametrize("name", ["weight", "margin"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("2", "is text ('2'"),
        (True, "is a boolean (True"),
        (math.nan, "is a number (nan"),
        (math.inf, "is a number (inf"),
        (-math.inf, "is a number (-inf"),
        (10**400, "is a number (1000"),
        ([1.0], "is a list ([1.0]"),
    ],
)
def test_what_is_no_finite_number_is_refused(name: str, value: Any, says: str) -> None:
    text = refuse({"prompt": "q", "chosen": "a", "rejected": "b", name: value})
    assert f"column '{name}' {says}" in text
    assert "write a finite number" in text


def test_a_weight_below_0_is_refused_and_a_margin_is_not() -> None:
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "w": -0.5, "margin": -0.5}
    assert parse(raw).margin == -0.5
    text = refuse(raw, weight="w")
    assert "column 'w' is a number (-0.5)" in text
    assert "of 0 or more (a row of weight 0 trains nothing)" in text


def test_unknown_key_in_column_map_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'promt' .*did you mean 'prompt'\?"):
        check_column_map({"promt": "question"})


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"prompt": "q", "chosen": "a"}, "column 'rejected' is missing"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, "column 'chosen' is null"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "column 'prompt' is a number (3)"),
        ({"prompt": "q", "chosen": True, "rejected": "b"}, "'chosen' is a boolean (True)"),
        ({"prompt": "q", "chosen": {"a": 1}, "rejected": "b"}, "'chosen' is an object"),
        ({"prompt": ["q"], "chosen": "a", "rejected": "b"}, "message 0 of column 'prompt' is text"),
        (
            {"prompt": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
            "message 0 of column 'prompt' has no role (role: null; keys: from, value)",
        ),
        (
            {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"},
            "the content of message 0 of column 'prompt' is null",
        ),
        (
            {"prompt": [user("q")], "chosen": [{"role": "assistant", "content": [1]}]}
            | {"rejected": "b"},
            "the content of message 0 of column 'chosen' is a list",
        ),
        ({"prompt": "q", "chosen": "\ud83d", "rejected": "b"}, "not valid Unicode"),
        ({"chosen": "some text", "rejected": "other"}, "add a 'prompt' column"),
        ({"chosen": "some text", "rejected": [user("q")]}, "add a 'prompt' column"),
        (
            {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
            "'prompt' is messages and 'chosen' is text (",
        ),
        (
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": "b"},
            "'prompt' is messages and 'rejected' is text (",
        ),
        ({"text": "a"}, "column 'chosen' is missing (columns: text)"),
        ({}, "(columns: none)"),
    ],
)
def test_wrong_rows_name_place_value_columns_and_remedy(raw: dict[str, Any], says: str) -> None:
    assert says in refuse(raw)


def test_missing_column_points_to_column_map() -> None:
    assert '--column_map \'{"rejected": "your_name"}\'' in refuse({"prompt": "q", "chosen": "a"})


def test_null_keys_of_messages_are_left_out_and_others_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    raw = {"prompt": [user("q")], "chosen": [call], "rejected": [assistant("b")]}
    assert parse(raw).completions[0] == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("value", "tools"),
    [([TOOL], [TOOL]), ('[{"a": 1}]', [{"a": 1}]), ("", None), ([], None), (None, None)],
)
def test_tools_as_list_or_json(value: Any, tools: Any) -> None:
    raw = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert parse(raw | {"tools": value}).tools == tools
    raw = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    assert parse(raw | {"tools": value}).tools == tools


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[{", "not valid JSON"),
        ("{}", "'tools' is an object"),
        ([3], "'tools' is a list"),
        (7, "'tools' is a number (7)"),
    ],
)
def test_wrong_tools(value: Any, says: str) -> None:
    raw = {"prompt": [user("q")], "chosen": "a", "rejected": "b", "tools": value}
    assert says in refuse(raw)


def test_tools_on_plain_text_are_refused_rather_than_ignored() -> None:
    raw = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [TOOL]}
    assert "no chat template is applied" in refuse(raw)
    hh = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert "no chat template is applied" in refuse(hh | {"tools": [TOOL]})
