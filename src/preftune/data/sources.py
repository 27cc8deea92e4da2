"""Where rows come from: a file, a folder of files, or a dataset of the Hugging Face Hub.

Files are read and never changed. Each row comes with an id that a person can find it by.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from preftune.errors import DataError

RawRow: TypeAlias = tuple[str, dict[str, Any]]
"""Row id and columns."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows in order, and how many where that is known without reading them all."""

    rows: Iterator[RawRow]
    total: int | None


def open_source(name: str, split: str) -> Source:
    """Find a dataset by path or by Hub id.

    Args:
        name: a file, a folder of files, or a Hub id; a path that exists wins over an id.
        split: of a folder, the files of that name (`train.jsonl`, `train-00000-of-00002.parquet`),
            or all files where none is named after a split; of a Hub dataset, its split. A single
            file is read whole.

    Returns:
        The rows. Ids are `file:line` for jsonl and csv, `file[index]` from 0 otherwise.

    Raises:
        DataError: nothing of that name, an unknown suffix, or, while reading, a file without rows
            or with rows that cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = _files_of_folder(path, split)
        return Source(_rows_of_files(files), None)
    if path.exists():
        _check_suffix(path)
        return Source(_rows_of_files([path]), None)
    if name.startswith(("/", "./", "../", "~")) or path.suffix.lower() in SUFFIXES:
        raise DataError(
            f"{path}: no such file or folder; correct the path (relative paths start from "
            f"{Path.cwd()})"
        )
    return _hub_source(name, split)


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    files = sorted(
        f
        for f in folder.iterdir()
        if f.is_file() and f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
    )
    if not files:
        raise DataError(
            f"{folder}: no {', '.join(SUFFIXES)} file in this folder; name a folder that holds "
            f"some, or a file"
        )
    chosen = [f for f in files if _split_of(f.stem) == split]
    if chosen:
        return chosen
    # A folder of train.jsonl and test.jsonl has no split "validation": reading both would train
    # and test on the same rows.
    others = sorted({_split_of(f.stem) for f in files} & set(_SPLIT_NAMES))
    if others:
        raise DataError(
            f"{folder}: no file of split {split!r}, though there are files of "
            f"{', '.join(others)}; choose one of these splits, or name the file itself"
        )
    return files


def _split_of(stem: str) -> str:
    return re.sub(r"-\d+-of-\d+$", "", stem)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}; convert it to one of "
            f"{', '.join(SUFFIXES)}"
        )


def _rows_of_files(files: list[Path]) -> Iterator[RawRow]:
    for path in files:
        empty = True
        try:
            for row in _rows_of_file(path):
                empty = False
                yield row
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}); check the file and its rights"
            ) from error
        if empty:
            raise DataError(f"{path}: the file holds no rows; remove it, or name another")


def _rows_of_file(path: Path) -> Iterator[RawRow]:
    match path.suffix.lower():
        case ".jsonl":
            return _jsonl_rows(path)
        case ".json":
            return _json_rows(path)
        case ".csv":
            return _csv_rows(path)
        case _:
            return _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    # Bytes split at \n only; text would also split at U+2028, which JSON strings may hold.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(path, f"{path}:{number}", line)
            if number == 1:
                text = text.removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON ({error}); correct or remove the line (each "
                    f"line of a .jsonl file is one JSON object)"
                ) from None
            yield f"{path.name}:{number}", _object(f"{path}:{number}", row)


def _json_rows(path: Path) -> Iterator[RawRow]:
    text = _decode(path, str(path), path.read_bytes()).removeprefix("\ufeff")
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        remedy = "correct the file"
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            remedy = "if each line is an object of its own, rename the file to .jsonl"
        raise DataError(f"{path}:{line}: not valid JSON ({error}); {remedy}") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: holds {_json_kind(rows)}, not a list of rows; write a list of objects, or "
            f"use .jsonl with one object a line"
        )
    for index, row in enumerate(rows):
        yield f"{path.name}[{index}]", _object(f"{path}[{index}]", row)


def _csv_rows(path: Path) -> Iterator[RawRow]:
    # Answers may be longer than csv's limit for one cell (128 KiB), which is global to the module.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = _read_csv(path)
    finally:
        csv.field_size_limit(limit)
    yield from rows


def _read_csv(path: Path) -> list[RawRow]:
    text = _decode(path, str(path), path.read_bytes()).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""))
    rows: list[RawRow] = []
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            number, start = start, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{number}: {len(cells)} cells, but the first line names {len(header)} "
                    f"columns ({', '.join(header)}); quote cells that hold commas or line breaks"
                )
            rows.append((f"{path.name}:{number}", dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: not valid CSV ({error}); correct the file"
        ) from None
    return rows


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        return
    index = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path.name}[{index}]", row
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not readable as Parquet past row {index} ({_first_line(error)}); write the "
            f"file anew"
        ) from None


def _hub_source(name: str, split: str) -> Source:
    absent = f"dataset {name!r}, split {split!r}: no local file or folder has that name, and"
    remedy = "check the spelling, the split, your login and the network, or give a path that exists"
    try:
        import datasets

        data = datasets.load_dataset(name, split=split)
    # Whatever goes wrong in there (network, rights, names, formats), the user's next step is ours
    # to say.
    except Exception as error:
        raise DataError(
            f"{absent} loading it from the Hugging Face Hub failed ({type(error).__name__}: "
            f"{_first_line(error)}); {remedy}"
        ) from error
    rows: Any = data
    total = len(rows)
    if not total:
        raise DataError(f"dataset {name!r}, split {split!r}: holds no rows; choose another split")
    return Source(((f"{name}[{i}]", dict(row)) for i, row in enumerate(rows)), total)


def _decode(path: Path, where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start}); save "
            f"{path.name} as UTF-8"
        ) from None


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: {_json_kind(row)}, not a JSON object; write a row as "
            f'{{"prompt": …, "chosen": …, "rejected": …}}'
        )
    return row


def _json_kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(
        type(value), "a number or boolean"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
