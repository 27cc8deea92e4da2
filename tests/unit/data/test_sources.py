"""Files, folders and Hub datasets: rows, ids, and errors that name the place."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preftune.data.sources import open_source
from preftune.errors import DataError
from tests.tiny import write_jsonl

ROWS = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]


def read(name: str | Path, split: str = "train") -> list[tuple[str, dict[str, Any]]]:
    return list(open_source(str(name), split).rows())


def refuse(name: str | Path, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read(name, split)
    return str(caught.value)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            write_jsonl(path, rows)
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case _:
            write_csv(path, rows)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"train.{suffix}", ROWS)
    before = path.read_bytes()
    rows = read(path)
    assert [row for _, row in rows] == ROWS
    expected = {
        "jsonl": "train.jsonl:1",
        "json": "train.json[0]",
        "parquet": "train.parquet[0]",
        "csv": "train.csv:2",
    }
    assert rows[0][0] == expected[suffix]
    assert path.read_bytes() == before


def test_broken_json_on_line_7(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS * 3)
    lines = path.read_text().splitlines()
    lines[6] = lines[6][:-1]
    path.write_text("\n".join(lines))
    text = refuse(path)
    assert text.startswith(f"{path}:7: not valid JSON (")
    assert "correct or remove the line" in text


def test_jsonl_with_blank_lines_a_bom_and_line_separators_inside_strings(tmp_path: Path) -> None:
    row = {"prompt": "a\u2028b\u0085c\x0b", "chosen": "x", "rejected": "y"}
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n")
    assert read(path) == [("d.jsonl:2", row)]


def test_jsonl_line_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n[1]\n')
    assert refuse(path).startswith(f"{path}:2: a list, not a JSON object")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": "x"}\n{"a": "\xe9"}\n')
    assert refuse(path).startswith(f"{path}:2: not UTF-8 text (byte 0xe9 at 7)")


def test_json_file_that_is_really_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    write_jsonl(path, ROWS)
    assert "rename the file to .jsonl" in refuse(path)


def test_json_that_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('{"a": 1}')
    assert refuse(path).startswith(f"{path}: holds an object, not a list of rows")
    path.write_text('[{"a": 1}, 3]')
    assert refuse(path).startswith(f"{path}[1]: a number or boolean, not a JSON object")
    path.write_text('[\n{"a": }]')
    assert refuse(path).startswith(f"{path}:2: not valid JSON")


def test_csv_with_quoted_line_breaks_counts_lines_of_the_file(tmp_path: Path) -> None:
    rows = [
        {"prompt": "two\nlines", "chosen": "a, b", "rejected": 'say "no"'},
        {"prompt": "q", "chosen": "", "rejected": "\u2028x"},
    ]
    path = write_csv(tmp_path / "d.csv", rows)
    assert read(path) == [("d.csv:2", rows[0]), ("d.csv:4", rows[1])]


def test_csv_cell_longer_than_the_modules_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    rows = [{"prompt": "q", "chosen": "x" * 200_000, "rejected": "b"}]
    assert read(write_csv(tmp_path / "d.csv", rows))[0][1] == rows[0]
    assert csv.field_size_limit() == limit


def test_csv_with_the_wrong_number_of_cells(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    assert refuse(path).startswith(f"{path}:3: 4 cells, but the first line names 3 columns")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_empty_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"d.{suffix}"
    path.touch()
    assert refuse(path).startswith(f"{path}: the file holds no rows")


def test_files_of_zero_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\n")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for suffix in ("json", "csv", "parquet"):
        assert "holds no rows" in refuse(tmp_path / f"a.{suffix}")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 not really")
    assert refuse(path).startswith(f"{path}: not readable as Parquet")


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    assert refuse(tmp_path / "no.jsonl").startswith(f"{tmp_path}/no.jsonl: no such file")
    assert "no such file" in refuse("relative.parquet")
    assert "no such file" in refuse("./folder")
    path = tmp_path / "d.xlsx"
    path.touch()
    assert refuse(path).startswith(f"{path}: unknown kind of file '.xlsx'; convert it to one of")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_file_without_rights(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", ROWS)
    path.chmod(0)
    assert "cannot be read" in refuse(path)


class TestFolder:
    def test_the_splits_files_are_read_and_no_others(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
        assert [i for i, _ in read(tmp_path, "test")] == ["test.jsonl:1"]
        assert len(read(tmp_path, "train")) == 3

    def test_shards_of_a_split_in_order(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train-00001-of-00002.jsonl", ROWS[:1])
        write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[1:])
        write_jsonl(tmp_path / "test-00000-of-00001.jsonl", ROWS)
        assert [row for _, row in read(tmp_path)] == [*ROWS[1:], ROWS[0]]

    def test_all_files_sorted_where_none_is_named_after_a_split(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "b.jsonl", ROWS[:1])
        write(tmp_path / "a.parquet", ROWS[1:])
        (tmp_path / "README.md").write_text("no rows")
        (tmp_path / ".hidden.jsonl").write_text("broken")
        assert [i for i, _ in read(tmp_path)] == ["a.parquet[0]", "a.parquet[1]", "b.jsonl:1"]

    def test_a_split_that_is_not_there_is_not_taken_from_other_splits(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        write_jsonl(tmp_path / "test.jsonl", ROWS)
        text = refuse(tmp_path, "validation")
        assert "no file of split 'validation'" in text
        assert "test, train" in text

    def test_no_data_file(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").touch()
        assert refuse(tmp_path).startswith(f"{tmp_path}: no .jsonl, .json, .parquet, .csv file")

    def test_an_empty_file_among_others(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "a.jsonl", ROWS)
        (tmp_path / "b.jsonl").touch()
        assert refuse(tmp_path).startswith(f"{tmp_path}/b.jsonl: the file holds no rows")


class TestHub:
    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(name: str, split: str) -> datasets.Dataset:
            assert (name, split) == ("org/set", "train_prefs")
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = open_source("org/set", "train_prefs")
        assert source.total == 3
        assert list(source.rows)[2] == ("org/set[2]", ROWS[2])

    def test_failure_names_the_dataset_and_says_no_such_path_exists(self) -> None:
        text = refuse("no-such-org/no-such-set")
        assert text.startswith("dataset 'no-such-org/no-such-set', split 'train': no local file")
        assert "failed (" in text
        assert "check the spelling" in text

    def test_no_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = datasets.Dataset.from_list([])
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: empty)
        assert "holds no rows" in refuse("org/set")
