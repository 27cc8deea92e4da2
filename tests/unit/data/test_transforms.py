"""Row functions: built-in ones, those of users, order, identity, errors that name the row."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import preftune
from preftune.data.formats import parse_row
from preftune.data.reasons import MEANING, Dropped, DropReason
from preftune.data.transforms import BUILTIN_TRANSFORMS, RowTransforms, load_transforms
from preftune.errors import ConfigError, DataError
from preftune.schema import Example

TEXT = {"prompt": "Hi", "chosen": "a", "rejected": "b"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def apply(row: dict[str, Any], *names: str) -> Any:
    return load_transforms(names)("d.jsonl:7", "d.jsonl", row)


def refuse(*names: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_transforms(names)
    return caught.value.problems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder to write modules into, which leaves no trace in the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


class TestBuiltin:
    def test_each_says_in_a_line_what_it_does(self) -> None:
        for name, function in BUILTIN_TRANSFORMS.items():
            assert function.__name__ == name
            assert (function.__doc__ or "").splitlines()[0].endswith(".")

    def test_text_to_messages(self) -> None:
        assert apply(TEXT | {"source": "s"}, "text_to_messages") == {
            "prompt": [user("Hi")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
            "source": "s",
        }

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            # The reader finds the system message here, which a user message would hide.
            {"prompt": "Hi", "chosen": [system("s"), user("Hi"), assistant("a")], "rejected": []},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi"},
        ],
    )
    def test_text_to_messages_leaves_other_rows_alone(self, row: dict[str, Any]) -> None:
        assert apply(row, "text_to_messages") == row

    def test_transcripts_to_messages(self) -> None:
        start = "\n\nHuman: Hi \n\nAssistant: Hello.\n\nHuman: More\n\nplease?\n\nAssistant:"
        row = {"chosen": start + " Yes.\n", "rejected": start + " No, Human: no."}
        shared = [user("Hi"), assistant("Hello."), user("More\n\nplease?")]
        expected = {
            "chosen": [*shared, assistant("Yes.")],
            "rejected": [*shared, assistant("No, Human: no.")],
        }
        assert apply(row, "transcripts_to_messages") == expected
        # The reader finds the same prompt and answers as in the prompt column.
        example = parse_row("r", expected, dataset="d", column_map={})
        assert isinstance(example, Example)
        assert example.prompt == shared
        row = {"prompt": start, "chosen": " Yes.\n", "rejected": row["rejected"]}
        expected = {"prompt": shared, "chosen": [assistant("Yes.")]} | {
            "rejected": expected["rejected"]
        }
        assert apply(row, "transcripts_to_messages") == expected

    def test_transcripts_to_messages_keeps_a_human_turn_apart_from_the_answer(self) -> None:
        row = {
            "prompt": "\n\nHuman: Hi\n\nAssistant:",
            "chosen": " a\n\nHuman: b\n\nAssistant: c",
            "rejected": " d",
        }
        assert apply(row, "transcripts_to_messages")["chosen"] == [
            assistant("a"),
            user("b"),
            assistant("c"),
        ]

    @pytest.mark.parametrize(
        "row",
        [
            TEXT,
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "plain"},
            {"chosen": [assistant("a")], "rejected": "\n\nHuman: Hi\n\nAssistant: a"},
            {"prompt": "\n\nHuman: Hi\n\nAssistant: no", "chosen": "a", "rejected": "b"},
        ],
    )
    def test_transcripts_to_messages_leaves_other_rows_alone(self, row: dict[str, Any]) -> None:
        assert apply(row, "transcripts_to_messages") == row

    def test_swap_sides(self) -> None:
        assert apply(TEXT, "swap_sides") == {"prompt": "Hi", "chosen": "b", "rejected": "a"}
        assert apply(TEXT, "swap_sides", "swap_sides") == TEXT

    def test_drop_system(self) -> None:
        row = {
            "prompt": [system("s"), user("Hi")],
            "chosen": [system("s"), assistant("a")],
            "rejected": "system",
        }
        assert apply(row, "drop_system") == {
            "prompt": [user("Hi")],
            "chosen": [assistant("a")],
            "rejected": "system",
        }
        assert apply({"chosen": ["no message"]}, "drop_system") == {"chosen": ["no message"]}

    def test_rows_of_one_answer(self) -> None:
        row = {"prompt": "Hi", "completion": " a ", "label": True}
        assert apply(row, "text_to_messages") == {
            "prompt": [user("Hi")],
            "completion": [assistant(" a ")],
            "label": True,
        }
        assert apply(row, "strip_answers")["completion"] == " a"
        assert apply(row, "swap_sides") == row | {"label": False}
        assert apply(row, "swap_sides", "swap_sides") == row
        pair = {"prompt": "Hi", "chosen": "a", "rejected": "b", "label": True}
        assert apply(pair, "swap_sides")["label"] is True
        unread = row | {"label": "good"}
        with pytest.raises(DataError, match="swap_sides"):
            apply(unread, "swap_sides")
        messages = {"prompt": [system("s"), user("q")], "completion": [system("s"), assistant("a")]}
        assert apply(messages, "drop_system") == {
            "prompt": [user("q")],
            "completion": [assistant("a")],
        }
        hh = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " a", "label": 0}
        assert apply(hh, "transcripts_to_messages") == {
            "prompt": [user("Hi")],
            "completion": [assistant("a")],
            "label": 0,
        }

    def test_strip_answers(self) -> None:
        row = {
            "prompt": [user(" Hi ")],
            "chosen": [assistant(" a "), user(" b "), assistant("\n c \n")],
            "rejected": [assistant(" a "), user(" b ")],
        }
        assert apply(row, "strip_answers") == row | {
            "chosen": [assistant(" a "), user(" b "), assistant("c")]
        }
        # A blank before a text answer is all that parts it from its prompt.
        assert apply({"prompt": "Q: ", "chosen": " a\n"}, "strip_answers") == {
            "prompt": "Q: ",
            "chosen": " a",
        }

    @pytest.mark.parametrize("content", [None, 3])
    def test_strip_answers_leaves_what_is_no_text(self, content: Any) -> None:
        row = {"chosen": [{"role": "assistant", "content": content}], "rejected": []}
        assert apply(row, "strip_answers") == row

    def test_the_row_given_is_not_changed(self) -> None:
        message = assistant(" a ")
        row = {"prompt": [system("s"), user("Hi")], "chosen": [message], "rejected": [message]}
        before = pickle.dumps(row)
        apply(row, "strip_answers", "drop_system", "swap_sides")
        assert pickle.dumps(row) == before

    def test_order_is_that_of_the_names(self) -> None:
        row = TEXT | {"chosen": " a "}
        assert apply(row, "text_to_messages", "strip_answers")["chosen"] == [assistant("a")]
        assert apply(row, "strip_answers", "text_to_messages")["chosen"] == [assistant(" a")]


class TestOwn:
    def test_a_function_of_the_current_folder(self, folder: Path) -> None:
        (folder / "my_rows.py").write_text(
            "def shout(row):\n    row['chosen'] = row['chosen'].upper()\n    return row\n"
        )
        row = dict(TEXT)
        assert apply(row, "my_rows:shout", "swap_sides")["rejected"] == "A"
        assert row == TEXT
        assert sys.path.count(str(folder)) == 1

    def test_dropping_a_row(self, folder: Path) -> None:
        (folder / "my_drop.py").write_text(
            "from preftune import DropRow\n"
            "def drop(row):\n    raise DropRow('too short')\n"
            "def mute(row):\n    raise DropRow\n"
        )
        reason = DropReason.DROPPED_BY_TRANSFORM
        result = apply(TEXT, "my_drop:drop")
        assert result == Dropped("d.jsonl:7", reason, "my_drop:drop: too short")
        assert apply(TEXT, "my_drop:mute") == Dropped("d.jsonl:7", reason, "my_drop:mute")
        assert set(MEANING) == set(DropReason)
        assert preftune.DropRow("x").args == ("x",)

    @pytest.mark.parametrize(
        ("value", "seen"),
        [("None", "returned nothing; return"), ("['a']", "returned list ['a']; return the row")],
    )
    def test_no_row_comes_back(self, folder: Path, value: str, seen: str) -> None:
        (folder / "my_none.py").write_text(f"def f(row):\n    return {value}\n")
        with pytest.raises(DataError) as caught:
            apply(TEXT, "my_none:f")
        text = str(caught.value)
        assert text.startswith("d.jsonl:7 of dataset d.jsonl: transform 'my_none:f' ")
        assert seen in text
        assert "preftune.DropRow" in text

    def test_a_failure_names_transform_row_and_cause(self) -> None:
        with pytest.raises(DataError) as caught:
            apply({"prompt": "Hi", "chosen": "a"}, "swap_sides")
        assert str(caught.value) == (
            "d.jsonl:7 of dataset d.jsonl: transform 'swap_sides' raised KeyError: 'rejected'; "
            "correct the transform or the row, or raise preftune.DropRow to leave the row out"
        )
        assert isinstance(caught.value.__cause__, KeyError)


class TestNames:
    def test_every_mistake_is_told(self, folder: Path) -> None:
        (folder / "my_broken.py").write_text("1 / 0\n")
        (folder / "my_script.py").write_text("raise SystemExit(3)\n")
        (folder / "my_good.py").write_text("def clean(row):\n    return row\nLIMIT = 3\n")
        problems = refuse(
            "swap_side",
            "my_absent:f",
            "my_broken:f",
            "my_script:f",
            "my_good:claen",
            "my_good:LIMIT",
            "my_good:clean",
            "my_good:",
            "my_good:clean(3)",
        )
        assert len(problems) == 8
        expected = [
            f"'swap_side' is not a transform (did you mean 'swap_sides'?); they are "
            f"{', '.join(BUILTIN_TRANSFORMS)}, and your own as module:function",
            "'my_absent:f': module 'my_absent' cannot be imported (ModuleNotFoundError: No module "
            f"named 'my_absent'); correct it, or run in the folder that holds it (this is {folder}",
            "'my_broken:f': module 'my_broken' cannot be imported (ZeroDivisionError: division by",
            "'my_script:f': module 'my_script' cannot be imported (SystemExit: 3)",
            f"'my_good:claen': module 'my_good' ({folder}/my_good.py) has no 'claen' (did you mean "
            f"'clean'?)",
            "'my_good:LIMIT' is of type int, which cannot be called",
            "'my_good:' is not written module:function, such as my_rows:clean",
            "'my_good:clean(3)' is not written module:function",
        ]
        for problem, text in zip(problems, expected, strict=True):
            assert problem.startswith(f"dataset_transforms: {text}")


class TestIdentity:
    def test_names_and_order(self) -> None:
        lists = [(), ("swap_sides",), ("drop_system",), ("swap_sides", "drop_system")]
        lists += [("drop_system", "swap_sides")]
        assert len({load_transforms(names).fingerprint for names in lists}) == len(lists)
        assert (
            load_transforms(["swap_sides"]).fingerprint
            == load_transforms(("swap_sides",)).fingerprint
        )

    def test_code_of_the_module_named_and_of_the_one_it_comes_from(self, folder: Path) -> None:
        (folder / "my_inner.py").write_text("def f(row):\n    return row\n")
        (folder / "my_outer.py").write_text("from my_inner import f\n")
        seen = {load_transforms(["my_outer:f"]).fingerprint}
        assert load_transforms(["my_outer:f"]).fingerprint in seen
        for name in ("my_inner.py", "my_outer.py"):
            with (folder / name).open("a") as file:
                file.write("# another\n")
            seen.add(load_transforms(["my_outer:f"]).fingerprint)
        assert len(seen) == 3

    def test_worker_processes_find_the_functions_again(self, folder: Path) -> None:
        (folder / "my_rows.py").write_text("f = lambda row: row | {'chosen': 'new'}\n")
        transforms = load_transforms(["my_rows:f", "swap_sides"])
        transforms("r", "d", TEXT)
        # A module of this process, unlike one of its own, is not there in the other one.
        code = (
            "import pickle, sys; t = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
            "print(t('r', 'd', {'chosen': 'a', 'rejected': 'b'}), t.fingerprint)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, pickle.dumps(transforms).hex()],
            env=os.environ | {"PYTHONPATH": str(Path(preftune.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout == f"{{'chosen': 'b', 'rejected': 'new'}} {transforms.fingerprint}\n"
        assert pickle.loads(pickle.dumps(transforms)) == RowTransforms(("my_rows:f", "swap_sides"))
